# SPDX-License-Identifier: Apache-2.0
"""SmolLM2-135M-Instruct as a Hugging Face checkpoint folder, made from the GGUF file in a public package.

    python tests/smollm2.py DIR

The GGUF is read by `transformers` and `gguf`, its 4-bit weights come out as float32 (540 MB).
"""

from __future__ import annotations

import sys
from pathlib import Path

from packages import cached, smollm2_gguf


def smollm2_folder() -> Path:
    """The checkpoint folder, made once and kept in the test cache."""
    return cached("smollm2-135m-1", convert)


def convert(folder: Path) -> None:
    """Write config.json, model.safetensors, tokenizer files with the chat template and generation_config.json."""
    import torch
    import transformers
    from safetensors.torch import save_file

    gguf = smollm2_gguf()
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    model = transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    assert model.config.tie_word_embeddings
    del model.config.quantization_config  # of the GGUF; these weights are float32
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    transformers.AutoTokenizer.from_pretrained(**source).save_pretrained(folder)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    target = Path(sys.argv[1])
    target.mkdir(parents=True, exist_ok=True)
    convert(target)
    print(f"{target}: {sum(f.stat().st_size for f in target.iterdir()) / 1e6:.0f} MB")
