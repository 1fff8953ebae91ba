"""What a user does who has the exported folders, torch, transformers and sentencepiece, and no kan_train: run with `python -I`, it prints JSON."""

import json
import sys
from pathlib import Path


class NoKanTrain:
    """Hides the package, wherever it is installed."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "kan_train":
            raise ModuleNotFoundError(name)


sys.meta_path.insert(0, NoKanTrain())

import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402


def answers(folder: Path, asked: dict) -> dict:
    trusted = {"trust_remote_code": True, "local_files_only": True}
    wide, model = (AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **trusted) for dtype in (torch.float64, "auto"))
    tokenizer = AutoTokenizer.from_pretrained(folder, **trusted)
    with torch.no_grad():
        logits = {"wide": wide(torch.tensor(asked["tokens"])).logits, "as_saved": model(torch.tensor(asked["tokens"])).logits}
    save_file(logits, folder.with_suffix(".logits"))
    inputs = tokenizer(asked["prompts"], return_tensors="pt", padding=True)
    settings = {"max_new_tokens": asked["new"]}
    out = model.generate(**inputs, **settings)
    alone = [model.generate(**tokenizer([prompt], return_tensors="pt"), **settings)[0].tolist() for prompt in asked["prompts"]]
    uncached = model.generate(**inputs, **settings, use_cache=False)
    beams = [model.generate(**inputs, **settings, num_beams=3, use_cache=cached).tolist() for cached in (True, False)]
    return {
        "batch": out.tolist(),
        "alone": alone,
        "uncached": uncached.tolist(),
        "beams": beams,
        "texts": [tokenizer.decode(row, skip_special_tokens=True) for row in out],
        "tokens": [tokenizer(text, add_special_tokens=False)["input_ids"] for text in asked["texts"]],
        "with_boundary": [tokenizer(text)["input_ids"] for text in asked["texts"]],
        "back": [tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) for text in asked["texts"]],
        "class": f"{type(model).__module__}.{type(model).__name__}",
    }


if __name__ == "__main__":
    question = json.loads(sys.stdin.read())
    print(json.dumps({name: answers(Path(folder), question["asked"]) for name, folder in question["folders"].items()}))
