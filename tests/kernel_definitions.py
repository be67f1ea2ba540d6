"""Which definitions each CUDA source is compiled with in tests, and for which architectures. A new `.cu` file gets its entry here."""

ARCHITECTURES = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120")

REPRESENTATIVE: dict[str, list[dict[str, int]]] = {
    "dense.cu": [{"KEY_PLANES": key, "VALUE_PLANES": value, "IS_KEY": side} for key, value in ((144, 160), (16, 48)) for side in (0, 1)],
}
