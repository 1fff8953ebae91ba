"""`kan export hf`: a trained model as a folder for Hugging Face's transformers."""

import math
from pathlib import Path

from kan_train.commands.output import progress_bar, size_text


def run_export_hf(source: str, root: Path, folder: Path, *, dtype: str = "fp32", overwrite: bool = False) -> int:
    """Write the folder and say what it holds. Returns the exit status."""
    from kan_train.export.folder import write_folder
    from kan_train.export.source import open_source

    opened = open_source(source, root)
    width = 2 if dtype == "bf16" else 4
    with progress_bar("exporting", width * sum(map(math.prod, opened.shapes.values()))) as advance:
        files = write_folder(opened, folder, dtype=dtype, overwrite=overwrite, advance=advance)
    size = sum(path.stat().st_size for path in folder.iterdir())
    many = "" if len(files) == 1 else f" in {len(files)} files of weights"
    print(f"{folder}: {size_text(size)}{many}, {dtype}, step {opened.step:,} of {opened.origin}")
    print(f'load it: AutoModelForCausalLM.from_pretrained("{folder}", trust_remote_code=True)')
    return 0
