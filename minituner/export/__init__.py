"""Ways out: folders that transformers, peft, vLLM and LMDeploy read. Lesson: notebook 09."""
