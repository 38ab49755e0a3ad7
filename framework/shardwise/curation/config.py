"""What a recipe says about filtering rows."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from shardwise.config.schema import (
    Fraction,
    NonNegativeInt,
    PositiveInt,
    Rows,
    Section,
    Weight,
    shown,
)
from shardwise.data.source import DataSource
from shardwise.rewards.scoring import RewardConfig
from shardwise.rewards.verifiers import SCRIPTS

Of = Literal["answer", "prompt", "row"]
_OF = "which text: the answer (of preferences each of them), the prompt, or both"


class FormatRule(Section):
    """Answers have the form of a template."""

    kind: Literal["format"]
    template: str = Field(
        "<think>{}</think><answer>{}</answer>",
        min_length=1,
        description="fixed pieces in this order, each once; {} for any text that is not blank",
    )

    @property
    def loosen(self) -> str:
        """What to change where it leaves nothing."""
        return "another template"


class LengthRule(Section):
    """Texts are neither too short nor too long."""

    model_config = shown(kind="length", max=512)

    kind: Literal["length"]
    of: Of = Field("answer", description=_OF)
    unit: Literal["characters", "words", "tokens", "steps"] = Field(
        "characters",
        description="tokens: of the run's tokenizer, without a template; steps: of rows of steps, "
        "else lines that are not blank",
    )
    min: NonNegativeInt = Field(0, description="fewest allowed")
    max: PositiveInt | None = Field(None, description="most allowed; null: any number")

    @model_validator(mode="after")
    def _bounds(self) -> Self:
        if self.max is not None and self.min > self.max:
            self.refuse(("min",), f"{self.min} is more than max, {self.max}")
        if self.max is None and not self.min:
            raise ValueError("a length rule needs min, max or both")
        return self

    @property
    def loosen(self) -> str:
        """See `FormatRule.loosen`."""
        return "a lower min or a higher max"


class LanguageRule(Section):
    """Letters are of the language's script, as the reward of that kind tells it."""

    kind: Literal["language"]
    of: Of = Field("answer", description=_OF)
    language: str = Field("en", description="language code, e.g. en, zh, ru", examples=["ru"])
    min_share: Fraction = Field(0.9, description="of the letters")

    @model_validator(mode="after")
    def _known(self) -> Self:
        if self.language not in SCRIPTS:
            known = ", ".join(sorted(SCRIPTS))
            self.refuse(("language",), f"{self.language!r} is not known; known: {known}")
        return self

    @property
    def loosen(self) -> str:
        """See `FormatRule.loosen`."""
        return "a lower min_share"


class VerifierRule(Section):
    """Answers earn a reward, scored anew; of preferences the better one."""

    kind: Literal["verifier"]
    reward: RewardConfig = Field(default_factory=RewardConfig, description="what scores")
    min: Weight = Field(1.0, description="lowest reward allowed")
    answer_field: str = Field(
        "answer", min_length=1, description="field of a row with its reference answer"
    )
    write: str | None = Field(
        None,
        min_length=1,
        description="field that the reward is written to, before scores are read",
        examples=["score"],
    )

    @property
    def loosen(self) -> str:
        """See `FormatRule.loosen`."""
        return "a lower min"


class ThresholdRule(Section):
    """Scores are within bounds; a row without a finite score goes."""

    model_config = shown(kind="threshold", min=1.0)

    kind: Literal["threshold"]
    field: str | None = Field(None, min_length=1, description="default: the job's score_field")
    min: Weight | None = Field(None, description="lowest score allowed", examples=[1.0])
    max: Weight | None = Field(None, description="highest score allowed", examples=[1.0])

    @model_validator(mode="after")
    def _bounds(self) -> Self:
        if self.min is None and self.max is None:
            raise ValueError("a threshold needs min, max or both")
        if self.min is not None and self.max is not None and self.min > self.max:
            self.refuse(("min",), f"{self.min} is more than max, {self.max}")
        return self

    @property
    def loosen(self) -> str:
        """See `FormatRule.loosen`."""
        return "a lower min or a higher max, or another field"


class DuplicatesRule(Section):
    """A row that says what a better one says goes; so does one that another set has."""

    kind: Literal["duplicates"]
    by: Of = Field("row", description="which texts are compared: both, the prompt or the answer")
    near: Annotated[float, Field(gt=0.0, le=1.0)] | None = Field(
        None,
        description="also rows whose prompts and whose answers share this much of their shingles "
        "(Jaccard); null: equal words alone",
        examples=[0.8],
    )
    shingle: Annotated[int, Field(ge=1, le=100)] = Field(3, description="words of a shingle")
    against: list[DataSource] = Field(
        default_factory=list,
        description="sets that are trained on anyway",
        examples=[[{"kind": "messages", "path": "train.jsonl"}]],
    )

    @property
    def loosen(self) -> str:
        """See `FormatRule.loosen`."""
        return "a higher near, or fewer sets in against"


class DiversityRule(Section):
    """Answers to one prompt differ from the better ones that are kept."""

    kind: Literal["diversity"]
    measure: Literal["edit", "jaccard"] = Field(
        "edit",
        description="edit: edit distance in words over those of the longer answer; jaccard: share "
        "of the shingles that only one of two answers has",
    )
    min_distance: Fraction = Field(0.2, description="from 0 (equal) to 1")
    shingle: Annotated[int, Field(ge=1, le=100)] = Field(3, description="words of a shingle")

    @property
    def loosen(self) -> str:
        """See `FormatRule.loosen`."""
        return "a lower min_distance"


class QuotaRule(Section):
    """The best of each prompt, and of all."""

    model_config = shown(kind="quota", per_prompt=4)

    kind: Literal["quota"]
    per_prompt: Rows | None = Field(None, description="rows of a prompt", examples=[4])
    total: PositiveInt | None = Field(None, description="rows of all", examples=[817])
    field: str | None = Field(
        None,
        min_length=1,
        description="field whose value stands for the prompt; null: what is asked, in its words",
        examples=["problem"],
    )

    @model_validator(mode="after")
    def _any(self) -> Self:
        if self.per_prompt is None and self.total is None:
            raise ValueError("a quota needs per_prompt, total or both")
        return self

    @property
    def loosen(self) -> str:
        """See `FormatRule.loosen`."""
        return "a higher per_prompt or total"


RowRule = FormatRule | LengthRule | LanguageRule | VerifierRule | ThresholdRule
SetRule = DuplicatesRule | DiversityRule | QuotaRule
Rule = Annotated[RowRule | SetRule, Field(discriminator="kind")]


class ContaminationConfig(Section):
    """What overlaps held-out sets: an equal prompt, or a run of words that both have.

    As for GPT-3 (arXiv 2005.14165, appendix C) words are compared in lower case, without
    punctuation.
    """

    on_overlap: Literal["error", "drop"] = Field(
        "error", description="drop: such rows go, and are counted"
    )
    ngram: Annotated[int, Field(ge=1, le=1000)] = Field(13, description="words of a run")
    share: Fraction = Field(
        0.0, description="of a held-out text's runs that a row has to have; 0: one is enough"
    )
    common: NonNegativeInt = Field(
        10,
        description="runs that stand in more held-out texts than this are a template's, and say "
        "nothing; 0: all count",
    )
    sources: list[DataSource] = Field(
        default_factory=list,
        description="held-out sets beside those that the recipe measures on",
        examples=[[{"kind": "messages", "path": "exam.jsonl"}]],
    )
    recipe: bool = Field(
        True, description="also what the recipe's stages and evaluations keep for measuring"
    )

    @property
    def loosen(self) -> str:
        """See `FormatRule.loosen`."""
        return "other prompts: these are held out"


class FilterRules(Section):
    """All rules of a filter. They are applied in a fixed order (`shardwise.curation`)."""

    rules: list[Rule] = Field(
        default_factory=list,
        description="what a row must meet, in any order; those of one kind in theirs",
        examples=[[{"kind": "threshold", "min": 1.0}, {"kind": "quota", "per_prompt": 4}]],
    )
    contamination: ContaminationConfig = Field(
        default_factory=ContaminationConfig, description="what is done with held-out text"
    )
    score_field: str = Field(
        "score",
        min_length=1,
        description="field with a row's score, higher is better; a dot leads into an object",
    )
