"""GenEval (arXiv 2310.11513): prompts, detectors, decision rule, summary, and the measure."""
