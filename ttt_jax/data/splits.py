"""Which split a generated example belongs to."""

SPLITS = ("train", "validation", "test")
HELD_OUT = 20
"""One example of so many goes to validation, another one to test."""


def split_of(index: int) -> str:
    """The split of the example with this number."""
    return {0: "validation", 1: "test"}.get(index % HELD_OUT, "train")


def numbers_by_split(count: int) -> dict[str, list[str]]:
    """Split -> the numbers of its examples out of `count`, as names, in their order."""
    return {split: [str(n) for n in range(count) if split_of(n) == split] for split in SPLITS}
