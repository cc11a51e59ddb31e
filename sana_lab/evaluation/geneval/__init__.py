"""GenEval: prompts, rule, detectors, measure."""
