"""What is known of families of base models that no config.json says, by `model_type`.

Seen in transformers 5.23; `tests/train/test_attention.py` reads the installed sources again.
"""

from __future__ import annotations

from typing import Final

# Their causal mask is built without positions (`create_causal_mask` in their modeling files), so that a packed row sees
# the rows before it.
BLIND_TO_POSITIONS: Final = frozenset(
    {
        *("afmoe", "biogpt", "bloom", "falcon", "gpt_oss", "granitemoehybrid", "mpt", "openai-gpt", "opt", "xglm"),
        # Encoders that can be asked to write.
        *(
            "bart",
            "bert",
            "bert-generation",
            "big_bird",
            "bigbird_pegasus",
            "blenderbot",
            "blenderbot-small",
            "camembert",
        ),
        *(
            "data2vec-text",
            "electra",
            "ernie",
            "marian",
            "mbart",
            "megatron-bert",
            "mvp",
            "pegasus",
            "plbart",
            "prophetnet",
        ),
        *(
            "reformer",
            "rembert",
            "roberta",
            "roberta-prelayernorm",
            "roc_bert",
            "roformer",
            "trocr",
            "xlm",
            "xlm-roberta",
        ),
        *("xlm-roberta-xl", "xlnet", "xmod", "cpmant", "git", "got_ocr2", "fuyu", "musicgen", "musicgen_melody"),
    }
)
