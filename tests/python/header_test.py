"""The structs, enumerations and functions that the package declares are those of api/vattn.h."""

import ctypes
import pathlib
import re
import unittest

from vattn import _attend, _enums, _options, _runtime, _structs, _version

HEADER = pathlib.Path(__file__).parents[2] / "api" / "vattn.h"
TEXT = re.sub(r"/\*.*?\*/", "", HEADER.read_text(), flags=re.S)

STRUCTS = {
    "vattn_options": _structs.Options,
    "vattn_sequence_options": _structs.SequenceOptions,
    "vattn_append_params": _structs.AppendParams,
    "vattn_prefill_params": _structs.PrefillParams,
    "vattn_prefix": _structs.Prefix,
    "vattn_attend_params": _structs.AttendParams,
    "vattn_merge_params": _structs.MergeParams,
    "vattn_selection": _structs.SelectionParams,
    "vattn_paged_options": _structs.PagedOptions,
    "vattn_paged_rows": _structs.PagedRows,
    "vattn_paged_step": _structs.PagedStep,
    "vattn_paged_prefill_params": _structs.PagedPrefillParams,
    "vattn_tenant_use": _structs.TenantUseStruct,
    "vattn_stats": _structs.StatsStruct,
}
ENUMS = {
    "vattn_code": _enums.Status,
    "vattn_dtype": _enums.DType,
    "vattn_backend": _enums.Backend,
    "vattn_policy": _enums.Policy,
    "vattn_index": _enums.Index,
    "vattn_norm": _enums.Norm,
    "vattn_on_unverified": _enums.OnUnverified,
    "vattn_bound": _enums.Bound,
    "vattn_target": _enums.Target,
    "vattn_io": _enums.Io,
    "vattn_admission": _enums.Admission,
    "vattn_tier": _enums.Tier,
    "vattn_partial": _enums.Partial,
    "vattn_partial_flag": _enums.PartialFlag,
    "vattn_verdict": _enums.Verdict,
    "vattn_log_level": _enums.LogLevel,
}
TYPES = {
    "size_t": ctypes.c_size_t,
    "int32_t": ctypes.c_int32,
    "int64_t": ctypes.c_int64,
    "uint64_t": ctypes.c_uint64,
    "float": ctypes.c_float,
    "vattn_log_function": _structs.LOG_FUNCTION,
}


def c_type(declared, pointer):
    if not pointer:
        return TYPES[declared]
    return ctypes.c_char_p if declared == "char" else ctypes.c_void_p


def fields_in_header(name):
    body = re.search(rf"typedef struct {name} \{{(.*?)\}} {name};", TEXT, re.S).group(1)
    fields = []
    for statement in filter(None, map(str.strip, body.split(";"))):
        declared, names = re.fullmatch(r"(?:const )?(\w+)\s*(.+)", statement, re.S).groups()
        for field in names.split(","):
            pointer = "*" in field
            fields.append((re.findall(r"\w+", field)[-1], c_type(declared, pointer)))
    return fields


class Header(unittest.TestCase):
    def test_structs(self):
        declared = re.findall(r"typedef struct (vattn_\w+) \{", TEXT)
        self.assertEqual(sorted(declared), sorted(STRUCTS))
        for name, struct in STRUCTS.items():
            self.assertEqual(struct._fields_, fields_in_header(name), name)

    def test_enumerations(self):
        declared = set(re.findall(r"typedef enum (vattn_\w+) \{", TEXT))
        self.assertEqual(declared - {"vattn_timeline"}, set(ENUMS))
        for name, enum in ENUMS.items():
            body = re.search(rf"typedef enum {name} \{{(.*?)\}}", TEXT, re.S).group(1)
            values = {key: int(value) for key, value in re.findall(r"VATTN_(\w+) = (\d+)", body)}
            for member in enum:
                ending = [
                    key for key in values if key == member.name or key.endswith(f"_{member.name}")
                ]
                self.assertIn(
                    member.value, [values[key] for key in ending], f"{name}: {member.name}"
                )
            self.assertEqual(sorted(values.values()), sorted(member.value for member in enum), name)

    def test_timeline_marks(self):
        self.assertIn(f"VATTN_TIMELINE_MARKS = {_attend.TIMELINE_MARKS}\n", TEXT)

    def test_functions(self):
        declared = re.findall(r"VATTN_EXPORT ([\w ]+?[ *]+)(vattn_\w+)\((.*?)\);", TEXT, re.S)
        self.assertEqual(sorted(name for _, name, _ in declared), sorted(_structs.FUNCTIONS))
        for result, name, parameters in declared:
            returned, arguments = _structs.FUNCTIONS[name]
            expected = {"vattn_code": _enums.Status, "void": None}.get(
                result.strip(), ctypes.c_char_p
            )
            self.assertIs(returned, expected, name)
            given = [] if parameters.strip() == "void" else parameters.split(",")
            names = [re.findall(r"\w+", parameter)[-1] for parameter in given]
            self.assertEqual(list(arguments), names, name)
            for parameter, kind in zip(given, arguments.values()):
                declared = re.fullmatch(r"\s*(\w+)\s+\w+", parameter)  # no pointer
                if declared is not None:
                    self.assertIs(kind, TYPES[declared.group(1)], f"{name}: {parameter}")

    def test_options(self):
        names = [name for name, _ in _structs.Options._fields_]
        shown = [name for name in names if name not in ("struct_size", "log", "log_user")]
        self.assertEqual(sorted(_options.ResolvedOptions.__annotations__), sorted(shown))
        self.assertEqual(sorted(_options.Options.__annotations__), sorted([*shown, "preset"]))

    def test_version(self):
        parts = re.findall(r"#define VATTN_VERSION_(?:MAJOR|MINOR|PATCH) (\d+)", TEXT)
        self.assertEqual(_version.__version__, ".".join(parts))

    def test_stats(self):
        for struct, shown in (
            (_structs.StatsStruct, _runtime.Stats),
            (_structs.TenantUseStruct, _runtime.TenantUse),
        ):
            names = [name for name, _ in struct._fields_ if name != "struct_size"]
            self.assertEqual(names, list(shown.__dataclass_fields__))


if __name__ == "__main__":
    unittest.main()
