"""What compressed keys and values do to a protein language model, preset by preset.

    python examples/encode_proteins.py --model facebook/esm2_t30_150M_UR50D --fasta FILE
    python examples/encode_proteins.py

Every second sequence calibrates, the others are compared with the uncompressed model. Without --fasta: four well-known proteins. Without --model: a small
ESM-2 of random weights, to see it run; its figures say nothing of a trained one. What is and isn't gained: docs/encoders.md
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoTokenizer, EsmConfig, EsmForMaskedLM, EsmTokenizer

from spectralquant.errors import SpectralQuantError
from spectralquant.integrations import calibrate_esm

SETTINGS: dict[str, dict[str, Any]] = {name: {"compression": name} for name in ("standard", "high", "max")} | {"8 bits": {"bits": 8}}
ALPHABET = ("<cls>", "<pad>", "<eos>", "<unk>", *"LAGVSERTIDPKQNFYMHWCXBUZO.-", "<null_1>", "<mask>")
"""ESM-2's tokens."""
PROTEINS = (
    # green fluorescent protein of Aequorea victoria
    "MSKGEELFTGVVPILVELDGDVNGHKFSVSGEGEGDATYGKLTLKFICTTGKLPVPWPTLVTTFSYGVQCFSRYPDHMKQHDFFKSAMPEGYVQERTIFFKDDGNYKTRAEVKFEGDTLVNRIELKGIDF"
    "KEDGNILGHKLEYNYNSHNVYIMADKQKNGIKVNFKIRHNIEDGSVQLADHYQQNTPIGDGPVLLPDNHYLSTQSALSKDPNEKRDHMVLLEFVTAAGITHGMDELYK",
    # lysozyme of the hen
    "KVFGRCELAAAMKRHGLDNYRGYSLGNWVCAAKFESNFNTQATNRNTDGSTDYGILQINSRWWCNDGRTPGSRNLCNIPCSALLSSDITASVNCAKKIVSDGNGMNAWVAWRNRCKGTDVQAWIRGCRL",
    # alpha chain of human haemoglobin
    "VLSPADKTNVKAAWGKVGAHAGEYGAEALERMFLSFPTTKTYFPHFDLSHGSAQVKGHGKKVADALTNAVAHVDDMPNALSALSDLHAHKLRVDPVNFKLLSHCLLVTLAAHLPAEFTPAVHASLDKFLASVSTVLTSKYR",
    # human ubiquitin
    "MQIFVKTLTGKTITLEVEPSDTIENVKAKIQDKEGIPPDQQRLIFAGKQLEDGRTLSDYNIQKESTLHLVLRLRGG",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub name of an ESM-2 (heads of 32 at least: 150M parameters or more)")
    parser.add_argument("--fasta", type=Path, metavar="FILE", help="of sequences")
    args = parser.parse_args(argv)
    try:
        model, tokenizer = load(args.model) if args.model else random_esm()
        sequences = read(args.fasta) if args.fasta else list(PROTEINS)
        if len(sequences) < 2:
            parser.error(f"--fasta {args.fasta}: it has {len(sequences)} sequences, expected at least 2: some calibrate, others are compared")
        batches = [tokenizer([sequence], return_tensors="pt") for sequence in sequences[1::2]]
        for name, options in SETTINGS.items():
            engine = calibrate_esm(model, tokenizer, sequences[::2], **options)
            print(f"{name:8}  {engine.compare(model, batches)}")
    except (SpectralQuantError, OSError) as error:
        print(f"encode_proteins: {error}", file=sys.stderr)
        return 2
    return 0


def load(name: str) -> tuple[Any, Any]:
    """A model of the class it was saved as, and its tokenizer."""
    architecture = getattr(transformers, AutoConfig.from_pretrained(name).architectures[0])
    return architecture.from_pretrained(name).eval(), AutoTokenizer.from_pretrained(name)


def random_esm() -> tuple[Any, Any]:
    """Heads of 64 and random weights."""
    torch.manual_seed(0)
    tokens = {"vocab_size": len(ALPHABET), "pad_token_id": 1, "mask_token_id": 32, "max_position_embeddings": 1026}
    shape = {"hidden_size": 128, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 256}
    model = EsmForMaskedLM(EsmConfig(**shape, **tokens, position_embedding_type="rotary", token_dropout=True)).eval()
    with tempfile.TemporaryDirectory() as folder:
        vocabulary = Path(folder) / "vocab.txt"
        vocabulary.write_text("\n".join(ALPHABET), encoding="utf-8")
        return model, EsmTokenizer(str(vocabulary))


def read(fasta: Path) -> list[str]:
    """Sequences of a FASTA file."""
    records = fasta.read_text(encoding="utf-8").split(">")[1:]
    return ["".join(record.split("\n")[1:]).replace(" ", "") for record in records]


if __name__ == "__main__":
    sys.exit(main())
