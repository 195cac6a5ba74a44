"""Scales and schemes in the terms of vLLM, compressed-tensors, llm-compressor, ModelOpt and SGLang."""
