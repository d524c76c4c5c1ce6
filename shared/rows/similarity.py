"""How alike two texts are, from 0 to 1, by the metrics of OpenAI's `text_similarity` grader. Pure.

OpenAI does not document its tokenizer and smoothing. Ours: words are what white space parts; BLEU is the sentence's
BLEU-4 with nltk's first smoothing (Chen and Cherry 2014), GLEU is nltk's (Wu et al. 2016); ROUGE is the F-measure of
`rouge-score` without stemming; `fuzzy_match` is rapidfuzz's `WRatio` with its default processor, as in OpenAI's guide.
"""

from __future__ import annotations

from typing import Final

from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
from nltk.translate.gleu_score import sentence_gleu
from rapidfuzz import fuzz, utils
from rouge_score.rouge_scorer import RougeScorer

from shared.contract.graders import Metric

_ROUGE: Final = {f"rouge_{n}": f"rouge{n}" for n in (1, 2, 3, 4, 5)} | {"rouge_l": "rougeL"}


def similarity(text: str, reference: str, *, metric: Metric) -> float:
    """From 0 to 1. Two texts without a word are alike; one without a word is like no other."""
    words, wanted = text.split(), reference.split()
    if not words or not wanted:
        return float(words == wanted)
    if metric == "fuzzy_match":
        return fuzz.WRatio(text, reference, processor=utils.default_process) / 100
    if metric == "bleu":
        return float(sentence_bleu([wanted], words, smoothing_function=SmoothingFunction().method1))
    if metric == "gleu":
        return float(sentence_gleu([wanted], words))
    name = _ROUGE[metric]
    return float(RougeScorer([name]).score(reference, text)[name].fmeasure)
