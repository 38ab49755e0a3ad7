"""TrainJob and JobSet: fields that the API knows, text that Kubernetes leaves as it is."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from kubeflow_trainer_api import models

from shardwise.config import yaml12
from shardwise.errors import ShardwiseError
from shardwise.launch import kubernetes
from shardwise.launch.cluster import ClusterJob, Task
from shardwise.launch.profile import ClusterProfile, KubernetesProfile

MODELS = {
    "TrainJob": models.TrainerV1alpha1TrainJob,
    "TrainingRuntime": models.TrainerV1alpha1TrainingRuntime,
    "JobSet": models.JobsetV1alpha2JobSet,
}


def job(*words: str, kind: str = "trainjob", **more: Any) -> ClusterJob:
    section = KubernetesProfile(
        kind=kind,  # type: ignore[arg-type]
        claim="runs",
        secret="tokens",
        service_account="trainer",
        queue="team",
        memory="64Gi",
        node_selector={"pool": "gpu"},
    )
    given = {"gpus": 8, "image": "x/y:1", "secrets": ["HF_TOKEN"], **more}
    profile = ClusterProfile(shared="/shared", kubernetes=section, **given)
    return ClusterJob("Big_run.v2", Task("/shared/run", words), 4, "/shared", 25.0, profile)


@pytest.mark.parametrize("kind", ["trainjob", "jobset"])
def test_every_field_is_the_apis(kind: str) -> None:
    """Unknown fields pass the models silently: what comes back is compared."""
    found = kubernetes.documents(job("r.yaml", kind=kind))
    for document in found:
        known = MODELS[document["kind"]].from_dict(document)
        assert known is not None and known.to_dict() == document
    assert [d["kind"] for d in found][-1].lower() == kind
    document = kubernetes.documents(job("r.yaml", kind=kind))[0]
    document["spec"]["nonsense"] = 1
    known = MODELS[document["kind"]].from_dict(document)
    assert known is None or known.to_dict() != document


def test_names_are_those_that_dns_allows() -> None:
    for name, expected in (("Big_run.v2", "big-run-v2"), ("7b", "run-7b"), ("a" * 90, "a" * 40)):
        whole = ClusterJob(name, Task("/r", ()), 1, "/", 1.0, job().profile)
        assert kubernetes.name_of(whole) == expected
        assert re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", kubernetes.name_of(whole))


def test_secrets_go_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijklmnop1234")
    text = kubernetes.render(job("r.yaml"))
    assert "abcdefghijklmnop" not in text and "secretKeyRef" in text
    assert [yaml12.parse(t, "").data for t in text.split("---\n")] == kubernetes.documents(
        job("r.yaml")
    )


def test_the_pods_decide_what_starts_again() -> None:
    [document] = kubernetes.documents(job("r.yaml", kind="jobset"))
    spec = document["spec"]["replicatedJobs"][0]["template"]["spec"]
    [rule] = spec["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob" and spec["template"]["spec"]["restartPolicy"] == "Never"
    assert rule["onExitCodes"]["operator"] == "NotIn"
    assert rule["onExitCodes"]["values"] == sorted(rule["onExitCodes"]["values"])
    assert 85 in rule["onExitCodes"]["values"] and 3 not in rule["onExitCodes"]["values"]
    [policy] = document["spec"]["failurePolicy"]["rules"]
    assert policy["onJobFailureReasons"] == ["PodFailurePolicy"]


def expanded(text: str, variables: dict[str, str]) -> str:
    """As Kubernetes' third_party/forked/golang/expansion does it."""
    out, at = "", 0
    while at < len(text):
        if text[at] == "$" and at + 1 < len(text):
            if text[at + 1] == "$":
                out, at = out + "$", at + 2
                continue
            if text[at + 1] == "(" and (end := text.find(")", at)) > 0:
                name = text[at + 2 : end]
                out, at = out + variables.get(name, f"$({name})"), end + 1
                continue
        out, at = out + text[at], at + 1
    return out


@pytest.mark.parametrize("text", ["$(A)", "$$(A)", "$$$(A)", "$A $$ $", "k=$((1+2))", "$(b"])
def test_no_value_of_the_environment_is_pasted(text: str) -> None:
    assert expanded(kubernetes.unexpanded(text), {"A": "secret"}) == text


def test_profile_names_what_is_missing(tmp_path: Path) -> None:
    assert "claim" in KubernetesProfile.model_fields
    with pytest.raises(ValueError, match="pods need one"):
        job("r.yaml", image=None)


def test_what_is_given_to_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "kubectl"
    tool.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/words\ncat > {tmp_path}/text\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.delenv("HF_TOKEN", raising=False)  # it is the cluster's
    whole = job("r.yaml")
    assert kubernetes.submit(whole, kubernetes.render(whole)) == "big-run-v2"
    assert (tmp_path / "words").read_text() == "create -f -\n"
    assert (tmp_path / "text").read_text() == kubernetes.render(whole)
    tool.write_text("#!/bin/sh\necho forbidden >&2; exit 1\n")
    with pytest.raises(ShardwiseError, match="kubectl: forbidden"):
        kubernetes.submit(whole, "")
