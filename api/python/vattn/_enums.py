"""The enumerations of api/vattn.h."""

import enum


class Status(enum.IntEnum):
    """vattn_code: what went wrong, in `Error.status`."""

    OK = 0
    INVALID_ARGUMENT = 1
    OUT_OF_MEMORY = 2
    NOT_SUPPORTED = 3
    DEVICE_ERROR = 4
    IO_ERROR = 5
    INTERNAL = 6
    FULL = 7
    DEVICE_LOST = 8
    DATA_LOSS = 9
    NOT_FOUND = 10


class DType(enum.IntEnum):
    """Element type of rows, queries and outputs."""

    F32 = 0
    F16 = 1
    BF16 = 2


class Backend(enum.IntEnum):
    """Where a runtime computes."""

    AUTO = 0
    CPU = 1
    CUDA = 2


class Policy(enum.IntEnum):
    """How rows of the middle are chosen."""

    VERIFIED = 0
    TOPK = 1
    TOPK_UNIFORM = 2
    DENSE = 3


class Index(enum.IntEnum):
    """What scores are predicted from."""

    BALANCED = 0
    EXACT = 1
    SIGN = 2
    HADAMARD2 = 3
    PAGE = 4
    POOLED = 5
    CLUSTERS = 6
    EXTERNAL = 7


class Norm(enum.IntEnum):
    """What the relative error is relative to."""

    VALUE = 0
    OUTPUT = 1


class OnUnverified(enum.IntEnum):
    """What happens to a head that could not be verified."""

    DENSE = 0
    BEST_EFFORT = 1


class Bound(enum.IntEnum):
    """Which quantile turns a variance into an error bound."""

    SHARP = 0
    SAFE = 1


class Target(enum.IntEnum):
    """What the sample of policy topk_uniform is sized for."""

    SDPA = 0
    NUMERATOR = 1
    DENOMINATOR = 2


class Io(enum.IntEnum):
    """How files are read and written."""

    AUTO = 0
    URING = 1
    PREAD = 2


class Admission(enum.IntEnum):
    """What a sequence may take from the host pool."""

    OVERCOMMIT = 0
    RESERVED = 1


class Tier(enum.IntEnum):
    """Where stored prefixes are."""

    AUTO = 0
    MEMORY = 1
    DISK = 2


class Verdict(enum.IntEnum):
    """What is known about one query head's output."""

    EXACT = 0
    VERIFIED = 1
    DENSE = 2
    BEST_EFFORT = 3


class Partial(enum.IntEnum):
    """Places in a record of one query head, with one context over several ranks."""

    IS_VERSION = 0
    RANK = 1
    ROUND = 2
    FLAGS = 3
    TOKENS = 4
    COUNT = 5
    TAIL = 6
    LSE = 7
    NORM2 = 8
    MIDDLE = 9
    LIGHT = 10
    LOG_UNIT = 11
    VARIANCE = 12
    SQUARES = 13
    OWN = 14
    MASS = 15
    SPREAD = 16
    WEIGHT = 17
    COS2 = 18
    PREDICTED = 19
    MEMORY = 20
    LOOK = 21
    GROWTH = 24
    SCALARS = 40


class PartialFlag(enum.IntFlag):
    """What Partial.FLAGS is a sum of."""

    WHOLE = 1
    NOTHING = 2
    STUCK = 4
    UNSURE = 8


class LogLevel(enum.IntEnum):
    """Severity of a log line."""

    ERROR = 0
    WARNING = 1
    INFO = 2
    DEBUG = 3
