"""Made-up proteins with structure that a masked language model can find.

A family has a motif and a contact distance. A sequence of a family:

- has 48 to 112 residues, drawn from a composition like that of real proteins;
- is a chain of contacts: residue i + d, where d is the family's distance, is the partner of residue i under a table: charges attract, cysteines bind, the
  rest is made up. The table is its own inverse, so that either of two tells the other. One contact in 10 is broken: its later residue is drawn anew;
- carries its family's motif twice, written over what was there at random places, which breaks those residues' contacts too.

So a masked residue follows from those 12 to 24 places away on both sides, at a distance that the motif tells. Tokens are those of ESM-2; 15 % of the
residues that are in a contact or a motif are masked. Shorter sequences of a batch are padded.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from base import IGNORED, SMALL, Batch, Split, Task, batch_numbers, random_stream
from torch import Tensor
from torch.nn.functional import pad
from transformers import EsmConfig, EsmForMaskedLM, PretrainedConfig

RESIDUES = "LAGVSERTIDPKQNFYMHWC"
"""In the order of ESM-2's alphabet, where the first has id 4."""
FIRST, CLS, PAD, EOS, MASK, VOCABULARY = 4, 0, 1, 2, 32, 33
SHARES = (9.7, 8.3, 7.1, 6.9, 6.6, 6.7, 5.5, 5.3, 5.9, 5.4, 4.7, 5.8, 3.9, 4.1, 3.9, 2.9, 2.4, 2.3, 1.1, 1.4)
"""How often each occurs, in per cent, rounded from what is usual."""
CONTACTS = ("KE", "RD", "LA", "IG", "FV", "YS", "WT", "MP", "QN", "HH", "CC")
"""Who meets whom, either way."""
FAMILIES = (("GKSTHW", 12), ("CPHCWN", 16), ("DFGWQM", 20), ("RGDYPN", 24))
"""Motif and contact distance."""
COPIES, BROKEN, MASKED = 2, 0.1, 0.15
SHORTEST, LONGEST, BATCH, TEST_BATCHES = 48, 112, 16, 48


@dataclass(frozen=True, slots=True)
class Protein:
    """Residues [L] as numbers in RESIDUES; the contact distance; contact [L], whether a residue is the partner of the one so far before; in_motif [L]."""

    residues: Tensor
    distance: int
    contact: Tensor
    in_motif: Tensor

    @property
    def maskable(self) -> Tensor:
        """[L]: what the rest of the sequence tells."""
        return self.contact | pad(self.contact[self.distance :], (0, self.distance)) | self.in_motif


def config() -> PretrainedConfig:
    tokens = {"vocab_size": VOCABULARY, "mask_token_id": MASK, "pad_token_id": PAD, "max_position_embeddings": LONGEST + 4}
    return EsmConfig(**SMALL, **tokens, num_hidden_layers=3, position_embedding_type="rotary", token_dropout=True)


def numbers(residues: str) -> Tensor:
    return torch.tensor([RESIDUES.index(r) for r in residues])


def partners() -> Tensor:
    """Residue -> the one it meets [20]."""
    table = torch.arange(len(RESIDUES))
    for one, other in CONTACTS:
        a, b = RESIDUES.index(one), RESIDUES.index(other)
        table[a], table[b] = b, a
    return table


def draw_protein(family: int, random: torch.Generator) -> Protein:
    motif, distance = FAMILIES[family]
    length = int(torch.randint(SHORTEST, LONGEST + 1, (1,), generator=random))
    residues = torch.multinomial(torch.tensor(SHARES), length, replacement=True, generator=random)
    contact = (torch.arange(length) >= distance) & (torch.rand(length, generator=random) >= BROKEN)
    for start in range(distance, length, distance):
        here = slice(start, min(start + distance, length))
        before = residues[start - distance : here.stop - distance]
        residues[here] = torch.where(contact[here], partners()[before], residues[here])
    in_motif = torch.zeros(length, dtype=torch.bool)
    for copy in range(COPIES):  # one in each part of the sequence, so that they don't overlap
        part = length // COPIES
        start = copy * part + int(torch.randint(part - len(motif) + 1, (1,), generator=random))
        residues[start : start + len(motif)], in_motif[start : start + len(motif)] = numbers(motif), True
    contact &= ~in_motif
    contact[distance:] &= ~in_motif[:-distance]
    return Protein(residues, distance, contact, in_motif)


def as_batch(proteins: list[Protein], random: torch.Generator) -> Batch:
    """Padded to the longest, between <cls> and <eos>, with residues masked and these as labels."""
    width = max(len(p.residues) for p in proteins) + 2
    ids, labels = torch.full((len(proteins), width), PAD), torch.full((len(proteins), width), IGNORED)
    for row, protein in enumerate(proteins):
        length = len(protein.residues)
        tokens = protein.residues + FIRST
        hidden = protein.maskable & (torch.rand(length, generator=random) < MASKED)
        ids[row, 0], ids[row, length + 1] = CLS, EOS
        ids[row, 1 : length + 1] = tokens.masked_fill(hidden, MASK)
        labels[row, 1 : length + 1] = tokens.masked_fill(~hidden, IGNORED)
    return {"input_ids": ids, "attention_mask": (ids != PAD).long(), "labels": labels}


def batches(split: Split, seed: int) -> Iterator[Batch]:
    random = random_stream(split, seed)
    for _ in batch_numbers(split, TEST_BATCHES):
        families = torch.randint(len(FAMILIES), (BATCH,), generator=random).tolist()
        yield as_batch([draw_protein(family, random) for family in families], random)


PROTEIN = Task("protein", EsmForMaskedLM, config, batches, steps=1000, learning_rate=2e-3)
