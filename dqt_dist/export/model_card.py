"""README.md of an export: what was trained, on what, how well, and how to open it."""

from __future__ import annotations

from typing import Any

OPEN_WITH = {
    "hf": """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH")
tokenizer = AutoTokenizer.from_pretrained("PATH")
```""",
    "gguf": """```
llama-cli -m model.gguf -p "..."
```""",
}

NOTES = {
    "hf": "All weights are floats, scale times integer. "
    "Activations are not rounded to 8 bits, as training may have done.",
    "hf-bitnet": "Linears are packed ternary codes, 2 bits a weight (`quant_method: bitnet`, needs `accelerate`). "
    "Activations are rounded to 8 bits a token, as in training (int8; training with fp8 products rounds them to e4m3).",
    "hf-compressed": "Linears are packed integer codes (`compressed-tensors`), opened by transformers and vLLM. "
    "transformers "
    "unpacks them at the first forward and scales 8-bit activations by max/127.5 where training has max/127.",
    "gguf": "Linears are packed integer codes with one scale a matrix, repeated in every block as fp16. "
    "llama.cpp rounds "
    "activations to 8 bits in blocks of its own, so its logits are within that rounding of the trained model's.",
}


def model_card(record: dict[str, Any]) -> str:
    """The text for a record (record.py)."""
    config, progress = record["config"], record["progress"]
    model, quantization, data = config["model"], config["quantization"], config["data"]
    export_format = record["format"]
    bits = record["bits"]
    weights = "floats" if bits is None else f"{bits} codes" if bits == "ternary" else f"{bits}-bit codes"
    if record["weights"] == "latent":
        weights = f"the values of {quantization['latent_bits']}-bit latents"
    method = {"dqt": "Direct Quantized Training", "bitnet": "BitNet b1.58", "none": "full precision"}
    # The end of a path names the corpus.
    sources = ", ".join(f"`{'/'.join(source['path'].split('/')[-2:])}`" for source in data["train"])
    rows = [
        ("method", method[quantization["method"]]),
        ("linear weights", weights),
        ("trained with", f"{progress['tokens']:,} tokens in {progress['step']:,} steps"),
        ("data", sources),
        (
            "layers / hidden / feed-forward",
            f"{model['num_layers']} / {model['hidden_size']} / {model['ffn_hidden_size']}",
        ),
        ("heads / key-value heads", f"{model['num_attention_heads']} / {model['num_query_groups']}"),
        ("vocabulary / context", f"{model['vocab_size']:,} / {model['seq_length']:,}"),
        ("sub-norms", "before o_proj and down_proj" if model["sub_norm"] else "none"),
        *[(name.replace("_", " "), _shown(value)) for name, value in record["figures"].items()],
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    opener = OPEN_WITH["gguf" if export_format == "gguf" else "hf"]
    return f"""---
library_name: {"gguf" if export_format == "gguf" else "transformers"}
pipeline_tag: text-generation
---
# A LLaMA with {weights}

| | |
|---|---|
{table}

Format `{export_format}`. {NOTES[export_format]}

{opener}

`dqt_dist.json` has the complete configuration of the run and the scale of every matrix;
`dqt-convert --from-hf` of dqt_dist turns the Hugging Face formats into a checkpoint again.
"""


def _shown(value: Any) -> str:
    if isinstance(value, str):
        return value
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
