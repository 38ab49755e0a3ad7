"""Kubernetes: a TrainJob of Kubeflow Trainer v2 with its runtime, or a plain JobSet.

Both run the same JobSet: one indexed job with a pod a node. The first pod's script decides as
elsewhere (`decide`), and says it with its exit code. 85, and pods that were killed or evicted,
start the whole set again; any other code is an end (`podFailurePolicy`, `failurePolicy`).

A TrainJob has a runtime of its own, since policies stand there and a TrainJob cannot change them.
https://www.kubeflow.org/docs/components/trainer, https://jobset.sigs.k8s.io
"""

from __future__ import annotations

import re
import signal
from typing import Any

from shardwise.config import yaml12
from shardwise.errors import ExitCode, exit_code_of_signal
from shardwise.launch.cluster import ClusterJob, fill, hand_over
from shardwise.launch.profile import KubernetesProfile

PORT = 29400
TRAINER = "trainer.kubeflow.org/v1alpha1"
# All pods of an attempt share the Job, and the next attempt has another one.
JOB_UID = "metadata.labels['batch.kubernetes.io/controller-uid']"
# After these the set starts again: 85, and what a container ends with that was killed.
AGAIN = [
    int(ExitCode.REQUEUE),
    exit_code_of_signal(signal.SIGKILL),
    exit_code_of_signal(signal.SIGTERM),
]


def render(job: ClusterJob) -> str:
    """The job's documents, as kubectl takes them."""
    return "---\n".join(yaml12.readable(document) for document in documents(job))


def submit(job: ClusterJob, text: str) -> str:
    """Create what was rendered; returns its name. Raises as `hand_over`."""
    hand_over(["kubectl", "create", "-f", "-"], text)
    return name_of(job)


def documents(job: ClusterJob) -> list[dict[str, Any]]:
    """The job's objects."""
    kubernetes = _section(job)
    metadata: dict[str, Any] = {"name": name_of(job), "namespace": kubernetes.namespace}
    labels = {"kueue.x-k8s.io/queue-name": kubernetes.queue} if kubernetes.queue else {}
    labelled = metadata | ({"labels": labels} if labels else {})
    if kubernetes.kind == "jobset":
        head = {"apiVersion": "jobset.x-k8s.io/v1alpha2", "kind": "JobSet"}
        return [{**head, "metadata": labelled, "spec": _set(job)}]
    policy = {"numNodes": job.nodes, "torch": {}}
    runtime = {"mlPolicy": policy, "template": {"spec": _set(job)}}
    reference = {"apiGroup": TRAINER.partition("/")[0], "kind": "TrainingRuntime"}
    trainjob = {
        "runtimeRef": {**reference, "name": name_of(job)},
        "trainer": {"numNodes": job.nodes, "numProcPerNode": job.ranks},
    }
    return [
        {"apiVersion": TRAINER, "kind": "TrainingRuntime", "metadata": metadata, "spec": runtime},
        {"apiVersion": TRAINER, "kind": "TrainJob", "metadata": labelled, "spec": trainjob},
    ]


def name_of(job: ClusterJob) -> str:
    """The run's name as Kubernetes writes names; room is left for what it appends for pods."""
    plain = re.sub(r"[^a-z0-9]+", "-", job.name.lower()).strip("-")[:40].strip("-")
    return plain if plain[:1].isalpha() else f"run-{plain}".strip("-")


def _set(job: ClusterJob) -> dict[str, Any]:
    stopped = {"action": "FailJob", "onExitCodes": {"containerName": "node"}}
    stopped["onExitCodes"] |= {"operator": "NotIn", "values": AGAIN}  # type: ignore[operator]
    policy = {
        "name": "stopped", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"],
    }  # fmt: skip
    pods = {
        "parallelism": job.nodes,
        "completions": job.nodes,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "podFailurePolicy": {"rules": [stopped]},
        "template": {"spec": _pod(job)},
    }
    # Trainer knows by this label whose pods are the trainer's.
    label = {"labels": {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}}
    return {
        "failurePolicy": {"maxRestarts": _section(job).max_restarts, "rules": [policy]},
        "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
        "replicatedJobs": [
            {"name": "node", "replicas": 1, "template": {"metadata": label, "spec": pods}}
        ],
    }


def _pod(job: ClusterJob) -> dict[str, Any]:
    kubernetes, profile = _section(job), job.profile
    name = name_of(job)
    script = fill(
        "node.sh.j2",
        job,
        target="kubernetes",
        attempt=f'"kubernetes.{name}.$JOB_UID"',
        node='"$JOB_COMPLETION_INDEX"',
        head=f"{name}-node-0-0.{name}",
        port=PORT,
        alone=[profile.python],
    )
    secrets = [
        {"name": key, "valueFrom": {"secretKeyRef": {"name": kubernetes.secret, "key": key}}}
        for key in profile.secrets
    ]
    uid = {"name": "JOB_UID", "valueFrom": {"fieldRef": {"fieldPath": JOB_UID}}}
    asked = {
        kubernetes.gpu: profile.gpus and str(profile.gpus),
        "cpu": str(cpus) if (cpus := kubernetes.cpus or profile.cpu_ranks) else None,
        "memory": kubernetes.memory,
    }
    container = {
        "name": "node",
        "image": profile.image,
        "command": ["/bin/sh", "-c", unexpanded(script)],
        "env": [uid, *secrets],
        "resources": {"limits": {key: value for key, value in asked.items() if value}},
        "volumeMounts": [
            {"name": "shared", "mountPath": profile.shared},
            {"name": "shm", "mountPath": "/dev/shm"},
        ],
    }
    memory = {"medium": "Memory", "sizeLimit": kubernetes.shared_memory}
    pod = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": job.patience_s + 30,
        "serviceAccountName": kubernetes.service_account,
        "nodeSelector": kubernetes.node_selector or None,
        "containers": [container],
        "volumes": [
            {"name": "shared", "persistentVolumeClaim": {"claimName": kubernetes.claim}},
            {"name": "shm", "emptyDir": memory},
        ],
    }
    return {key: value for key, value in pod.items() if value is not None}


def unexpanded(text: str) -> str:
    """``text`` as a container's command, in which Kubernetes reads ``$(NAME)`` and ``$$``."""
    return re.sub(r"\$(?=[$(])", "$$", text)


def _section(job: ClusterJob) -> KubernetesProfile:
    assert job.profile.kubernetes is not None
    return job.profile.kubernetes
