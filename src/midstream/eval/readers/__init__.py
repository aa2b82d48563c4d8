"""The official files of the visual benchmarks, as downloaded -> examples (docs/evaluation.md)."""

from midstream.eval.readers.boxes import (
    OCID_EXPRESSIONS,
    REFCOCO_INSTANCES,
    REFCOCO_REFS,
    read_ocid_ref,
    read_refcoco,
    read_refcocog,
)
from midstream.eval.readers.choices import read_ai2d, read_tallyqa, read_vsr
from midstream.eval.readers.examples import VisualExample
from midstream.eval.readers.plain import QA_QUESTIONS, read_qa
from midstream.eval.readers.questions import (
    GQA_QUESTIONS,
    POPE_SPLITS,
    TEXTVQA_QUESTIONS,
    VQAV2_ANNOTATIONS,
    VQAV2_QUESTIONS,
    read_gqa,
    read_pope,
    read_textvqa,
    read_textvqa_ocr,
    read_vizwiz,
    read_vqav2,
)

__all__ = [
    "GQA_QUESTIONS",
    "OCID_EXPRESSIONS",
    "POPE_SPLITS",
    "QA_QUESTIONS",
    "REFCOCO_INSTANCES",
    "REFCOCO_REFS",
    "TEXTVQA_QUESTIONS",
    "VQAV2_ANNOTATIONS",
    "VQAV2_QUESTIONS",
    "VisualExample",
    "read_ai2d",
    "read_gqa",
    "read_ocid_ref",
    "read_pope",
    "read_qa",
    "read_refcoco",
    "read_refcocog",
    "read_tallyqa",
    "read_textvqa",
    "read_textvqa_ocr",
    "read_vizwiz",
    "read_vqav2",
    "read_vsr",
]
