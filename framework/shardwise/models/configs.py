"""The table of families, in a module without torch; see `shardwise.models` for adding one."""

from __future__ import annotations

import dataclasses

from shardwise.config.registry import register_model_config
from shardwise.models.common.config import DecoderConfig
from shardwise.models.dense import (
    arcee,
    cohere,
    cohere2,
    ernie4_5,
    exaone4,
    gemma,
    gemma2,
    gemma3,
    glm,
    glm4,
    gpt2,
    gpt_neox,
    granite,
    granite_swa,
    helium,
    llama,
    ministral3,
    nemotron,
    olmo2,
    olmo3,
    phi3,
    seed_oss,
    smollm3,
    starcoder2,
)
from shardwise.models.dense.names import Names
from shardwise.models.dense.release import Release


@dataclasses.dataclass(frozen=True)
class Table:
    """A family's keys, and how transformers says them and its tensors."""

    config: type[DecoderConfig]
    releases: tuple[Release, ...]
    names: Names = dataclasses.field(default_factory=Names)


TABLES: dict[str, Table] = {
    "llama": Table(llama.LlamaConfig, llama.RELEASES),
    "gpt2": Table(gpt2.GPT2Config, (gpt2.RELEASE,), gpt2.NAMES),
    "gemma": Table(gemma.GemmaConfig, (gemma.RELEASE,)),
    "gemma2": Table(gemma2.Gemma2Config, (gemma2.RELEASE,), gemma2.NAMES),
    "gemma3": Table(gemma3.Gemma3Config, (gemma3.RELEASE,), gemma2.NAMES),
    "olmo2": Table(olmo2.Olmo2Config, (olmo2.RELEASE,), olmo2.NAMES),
    "olmo3": Table(olmo3.Olmo3Config, (olmo3.RELEASE,), olmo2.NAMES),
    "smollm3": Table(smollm3.SmolLM3Config, (smollm3.RELEASE,)),
    "phi3": Table(phi3.Phi3Config, (phi3.RELEASE,), phi3.NAMES),
    "granite": Table(granite.GraniteConfig, (granite.RELEASE,)),
    "granite_swa": Table(granite_swa.GraniteSwaConfig, (granite_swa.RELEASE,), granite_swa.NAMES),
    "ministral3": Table(ministral3.Ministral3Config, (ministral3.RELEASE,)),
    "seed_oss": Table(seed_oss.SeedOssConfig, (seed_oss.RELEASE,)),
    "starcoder2": Table(starcoder2.Starcoder2Config, (starcoder2.RELEASE,), starcoder2.NAMES),
    "exaone4": Table(exaone4.Exaone4Config, (exaone4.RELEASE,), olmo2.NAMES),
    "glm": Table(glm.GlmConfig, (glm.RELEASE,), glm.NAMES),
    "glm4": Table(glm4.Glm4Config, (glm4.RELEASE,), glm4.NAMES),
    "helium": Table(helium.HeliumConfig, (helium.RELEASE,)),
    "ernie4_5": Table(ernie4_5.Ernie45Config, (ernie4_5.RELEASE,)),
    "arcee": Table(arcee.ArceeConfig, (arcee.RELEASE,)),
    "nemotron": Table(nemotron.NemotronConfig, (nemotron.RELEASE,)),
    "gpt_neox": Table(gpt_neox.GPTNeoXConfig, (gpt_neox.RELEASE,), gpt_neox.NAMES),
    "cohere": Table(cohere.CohereConfig, (cohere.RELEASE,)),
    "cohere2": Table(cohere2.Cohere2Config, (cohere2.RELEASE,)),
}

for family, table in TABLES.items():
    register_model_config(family, table.config)
