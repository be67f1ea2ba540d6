"""Which definitions each CUDA source is compiled with in tests, and for which architectures. A new `.cu` file gets its entry here."""

ARCHITECTURES = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120")

_WHITEN = {"D": 128, "DTYPE": 2, "RUN": 256, "PAIRS": 64, "INTERLEAVED": 0, "TRAJECTORY": 1, "BY_COORDINATE": 0, "SIZES": 0}
_ATTEND = {
    "D": 128,
    "CK": 8,
    "CV": 10,
    "CB": 3,
    "RUN": 256,
    "SPLIT_BIAS": 1,
    "FLOAT_QUERY": 0,
    "IS_BF16": 1,
    "USE_SOFTCAP": 0,
    "USE_SINKS": 0,
    "COLUMNS": 1,
    "TRANSFORM_IN_SHARED": 1,
    "TABLE_IN_SHARED": 1,
    "USE_PREFIX": 0,
    "USE_PAGES": 0,
}

_DENSE = {"D": 128, "KEY_PLANES": 144, "VALUE_PLANES": 160, "IS_KEY": 1, "OUT": 2, "PAIRS": 64, "INTERLEAVED": 0, "RUN": 256}

REPRESENTATIVE: dict[str, list[dict[str, int]]] = {
    "attend.cu": [
        _ATTEND,
        {**_ATTEND, "COLUMNS": 2, "D": 64, "CK": 4, "CV": 5, "CB": 2, "SPLIT_BIAS": 0, "FLOAT_QUERY": 1, "IS_BF16": 0},
        {**_ATTEND, "COLUMNS": 2, "D": 256, "CK": 17, "CV": 19, "TRANSFORM_IN_SHARED": 0, "TABLE_IN_SHARED": 0, "USE_SOFTCAP": 1, "IS_BF16": 0},
        {**_ATTEND, "D": 80, "CK": 5, "CV": 6, "RUN": 0, "CB": 0, "SPLIT_BIAS": 0, "USE_SINKS": 1},
        {**_ATTEND, "USE_PREFIX": 1},
        {**_ATTEND, "USE_PAGES": 1},
        {**_ATTEND, "USE_PAGES": 1, "COLUMNS": 2, "D": 64, "CK": 4, "CV": 5, "CB": 2, "SPLIT_BIAS": 0, "FLOAT_QUERY": 1, "IS_BF16": 0},
        {**_ATTEND, "USE_PAGES": 1, "D": 80, "CK": 5, "CV": 6, "RUN": 0, "CB": 0, "SPLIT_BIAS": 0, "USE_SINKS": 1},
    ],
    "whiten.cu": [
        _WHITEN,
        {**_WHITEN, "RUN": 0, "PAIRS": 0, "TRAJECTORY": 0, "BY_COORDINATE": 1, "SIZES": 1},
        {**_WHITEN, "D": 240, "DTYPE": 1, "PAIRS": 60, "INTERLEAVED": 1, "TRAJECTORY": 0},
        {**_WHITEN, "D": 80, "DTYPE": 0, "PAIRS": 10},
    ],
    "encode_scalar.cu": [{"D": 128, "PLANES": 128, "IS_KEY": 1, "GAIN": 2}, {"D": 80, "PLANES": 96, "IS_KEY": 0, "GAIN": 1}],
    "encode_joint.cu": [
        {"D": 128, "PLANES": 160, "IS_KEY": 0, "GAIN": 1, "BLOCKS": 8, "SIDE": 4},
        {"D": 256, "PLANES": 304, "IS_KEY": 0, "GAIN": 1, "BLOCKS": 16, "SIDE": 4},
        {"D": 112, "PLANES": 160, "IS_KEY": 0, "GAIN": 0, "BLOCKS": 4, "SIDE": 1},
    ],
    "exact.cu": [{"D": 128}, {"D": 80}],
    "pages.cu": [{}],
    "tokens.cu": [{"D": 128, "PK": 128, "PV": 160, "IS_BF16": 1}, {"D": 80, "PK": 80, "PV": 96, "IS_BF16": 0}],
    "append.cu": [{"D": 128}, {"D": 80}],
    "dense.cu": [
        _DENSE,
        {**_DENSE, "IS_KEY": 0, "PAIRS": 0, "RUN": 0},
        {**_DENSE, "D": 256, "KEY_PLANES": 288, "VALUE_PLANES": 304, "PAIRS": 128, "OUT": 0, "RUN": 0},
        {**_DENSE, "D": 80, "KEY_PLANES": 80, "VALUE_PLANES": 96, "PAIRS": 10, "OUT": 1, "INTERLEAVED": 1},
    ],
}
