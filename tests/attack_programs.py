"""Pickle programs that attack: an assembler, and what to do with it."""

import io
import os
import pickle
import struct
import zipfile

from checkpoint_support import parts, saved


def archive(program, storages=None, extra=(), compression=zipfile.ZIP_STORED, root="model"):
    """A zip as torch makes it, around a pickle program."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as target:
        target.writestr(f"{root}/data.pkl", program)
        for key, content in (storages or {}).items():
            target.writestr(f"{root}/data/{key}", content)
        for name, content in extra:
            target.writestr(name, content)
    return file.getvalue()


# An assembler for pickle programs.
def text(value):
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def name(module, attribute):
    return f"c{module}\n{attribute}\n".encode()


def number(value):
    packed = value.to_bytes(10, "little", signed=True)
    return b"\x8a" + bytes([len(packed)]) + packed


def tuple_of(*items):
    return b"(" + b"".join(items) + b"t"


def call(function, *arguments):
    return function + tuple_of(*arguments) + b"R"


def program(body, version=2):
    return b"\x80" + bytes([version]) + body + b"."


def storage(key="0", numel=4, kind="FloatStorage"):
    count = numel if isinstance(numel, bytes) else number(numel)
    return tuple_of(text("storage"), name("torch", kind), text(key), text("cpu"), count) + b"Q"


def tensor(offset=0, shape=(4,), stride=(1,), **options):
    def row(values):
        return tuple_of(*(v if isinstance(v, bytes) else number(v) for v in values))

    return call(
        name("torch._utils", "_rebuild_tensor_v2"),
        options["base"] if "base" in options else storage(),
        number(offset),
        row(shape),
        row(stride),
        b"\x89",
        b"N",
    )


class Reduces:
    """An object whose pickle calls a function."""

    def __init__(self, function, *arguments):
        self._what = (function, arguments)

    def __reduce__(self):
        return self._what


def programs(canary):
    """Pickles that try to run something, or to get at what could: {name: (bytes, message)}."""
    touch = text(f"touch {canary}")
    write = text(f"open({str(canary)!r}, 'w').write('x')")
    calls = {
        "os_system": call(name("os", "system"), touch),
        "posix_system": call(name("posix", "system"), touch),
        "nt_system": call(name("nt", "system"), touch),
        "os_popen": call(name("os", "popen"), touch),
        "builtins_eval": call(name("builtins", "eval"), write),
        "builtins_exec": call(name("builtins", "exec"), write),
        "python2_eval": call(name("__builtin__", "eval"), write),
        "python2_execfile": call(name("__builtin__", "execfile"), write),
        "builtins_import": call(name("builtins", "__import__"), text("os")),
        "builtins_getattr": call(name("builtins", "getattr"), text("x"), text("upper")),
        "builtins_open": call(name("builtins", "open"), text(str(canary)), text("w")),
        "builtins_type": call(name("builtins", "type"), text("x")),
        "subprocess_popen": call(name("subprocess", "Popen"), touch),
        "subprocess_output": call(name("subprocess", "check_output"), touch),
        "pickle_loads": call(name("pickle", "loads"), text("x")),
        "marshal_loads": call(name("marshal", "loads"), text("x")),
        "import_module": call(name("importlib", "import_module"), text("antigravity")),
        "runpy": call(name("runpy", "run_path"), text(str(canary))),
        "shutil_rmtree": call(name("shutil", "rmtree"), text(str(canary))),
        "webbrowser": call(name("webbrowser", "open"), text("http://localhost")),
        "function_type": call(name("types", "FunctionType"), text("x")),
        "code_type": call(name("types", "CodeType"), number(0)),
        "partial": call(name("functools", "partial"), text("x")),
        "attrgetter": call(name("operator", "attrgetter"), text("system")),
        "methodcaller": call(name("operator", "methodcaller"), text("system")),
        "torch_load": call(name("torch.serialization", "load"), text(str(canary))),
        "torch_hub": call(name("torch.hub", "load"), text("x"), text("y")),
        "storage_from_bytes": call(name("torch.storage", "_load_from_bytes"), text("x")),
        "rebuild_from_type": call(
            name("torch._tensor", "_rebuild_from_type_v2"), name("os", "system"), touch
        ),
        "rebuild_quantized": call(name("torch._utils", "_rebuild_qtensor"), storage()),
        "rebuild_sparse": call(name("torch._utils", "_rebuild_sparse_tensor"), b"N", b"N"),
        "rebuild_wrapper": call(name("torch._utils", "_rebuild_wrapper_subclass"), b"N"),
        "numpy_reconstruct": call(name("numpy.core.multiarray", "_reconstruct"), b"N"),
        "reconstructor": call(name("copyreg", "_reconstructor"), b"N"),
        "newobj_function": call(name("copyreg", "__newobj__"), name("os", "system")),
        "extension_registry": call(name("copyreg", "add_extension"), text("os")),
        "dotted_name": call(name("torch.nn.modules.module", "Module.__init__"), touch),
        "function_of_torch": call(
            name("torch.nn.modules.module", "register_module_buffer_x"), b"N"
        ),
        "module_below": call(name("torch.nn.modules.x.y", "Module"), touch),
        "module_beside": call(name("torch.nn.modules", "Module"), touch),
        "unknown_module": call(name("models.vit", "Backdoor"), touch),
        "own_function": call(name("quantwm.loading", "save"), touch),
    }
    result = {key: (program(body), "asks for") for key, body in calls.items()}
    linear = name("torch.nn.modules.linear", "Linear")
    made = linear + b")\x81"
    system = name("os", "system")
    dotted = text("torch.nn.modules.module") + text("Module.forward") + b"\x93"
    tricks = {
        "stack_global": (program(text("os") + text("system") + b"\x93", 4), "asks for"),
        "stack_global_dotted": (program(dotted, 4), "asks for"),
        "stack_global_of_numbers": (program(b"K\x01K\x02\x93", 4), "something else than text"),
        "setstate_function": (
            program(made + b"}" + text("__setstate__") + system + b"sb"),
            "asks for",
        ),
        "class_swap": (program(made + b"}" + text("__class__") + system + b"sb"), "asks for"),
        "setstate_of_a_class": (program(linear + b"}b"), "sets attributes"),
        "setstate_of_a_function": (
            program(name("torch._utils", "_rebuild_parameter") + b"}b"),
            "sets attributes",
        ),
        "setstate_slots_of_a_class": (
            program(linear + b"N}" + text("forward") + text("x") + b"s\x86b"),
            "sets attributes",
        ),
        "setstate_of_a_list": (program(b"]}b"), "sets attributes"),
        "call_an_object": (program(call(made, touch)), "calls"),
        "call_text": (program(call(text("os.system"), touch)), "calls"),
        "call_plain_type": (program(call(name("builtins", "int"), touch)), "calls"),
        "arguments_no_tuple": (program(linear + b"]R"), "as arguments"),
        "new_function": (
            program(name("torch._utils", "_rebuild_tensor_v2") + b")\x81"),
            "makes an object",
        ),
        "new_dictionary": (program(name("collections", "OrderedDict") + b")\x81"), "makes an"),
        "new_with_keywords": (program(linear + b")}\x92", 4), "operation NEWOBJ_EX"),
        "instance": (program(b"(" + touch + b"ios\nsystem\n"), "operation INST"),
        "object": (program(b"(" + linear + touch + b"o"), "operation OBJ"),
        "extension": (program(b"\x82\x01"), "operation EXT1"),
        "persistent_text": (program(b"Pos.system\n"), "operation PERSID"),
        "persistent_module": (
            program(tuple_of(text("module"), linear, text("x"), text("import os")) + b"Q"),
            "outside of it",
        ),
        "persistent_call": (program(call(system, touch) + b"Q"), "asks for"),
        "out_of_band": (program(b"\x97", 5), "operation NEXT_BUFFER"),
        "append_to_object": (program(made + text("x") + b"a"), "appends to"),
        "items_of_object": (program(made + text("x") + text("y") + b"s"), "sets items"),
        "set_items_of_object": (program(made + b"(" + text("x") + b"\x90", 4), "adds to"),
    }
    nested = Reduces(os.system, f"touch {canary}")
    holders = {
        "reduce_beside_the_parts": parts() | {"extra": nested},
        "reduce_in_the_decoder": parts() | {"decoder": [nested]},
        "reduce_as_a_key": parts() | {nested: 1},
        "reduce_chain": parts() | {"x": Reduces(getattr, Reduces(__import__, "os"), "system")},
    }
    tricks |= {key: (saved(content), "asks for") for key, content in holders.items()}
    tricks["reduce_without_a_zip"] = (pickle.dumps(nested), "no zip archive")
    return result | tricks


def tensors():
    """torch's own rebuilding functions with wild arguments."""
    huge = 2**47
    wild = {
        "negative_offset": (tensor(offset=-1), "no count"),
        "negative_shape": (tensor(shape=(-4,)), "no count"),
        "negative_stride": (tensor(stride=(-1,)), "no count"),
        "far_offset": (tensor(offset=huge), "reaches beyond"),
        "huge_shape": (tensor(shape=(huge,)), "reaches beyond"),
        "huge_expanded": (tensor(shape=(huge,), stride=(0,)), "reaches beyond"),
        "expanded": (tensor(shape=(4, 4), stride=(0, 1)), "reaches beyond"),
        "overflowing_shape": (tensor(shape=(2**75,)), "no count"),
        "overflowing_product": (tensor(shape=(huge,) * 8, stride=(0,) * 8), "reaches beyond"),
        "many_dimensions": (tensor(shape=(1,) * 99, stride=(1,) * 99), "do not belong"),
        "shape_of_text": (tensor(shape=(text("4"),)), "no count"),
        "shape_of_floats": (tensor(shape=(b"G" + struct.pack(">d", 4.0),)), "no count"),
        "shape_of_booleans": (tensor(shape=(b"\x88",)), "no count"),
        "strides_missing": (tensor(stride=()), "do not belong"),
        "no_storage": (tensor(base=text("0")), "without a storage"),
        "few_arguments": (call(name("torch._utils", "_rebuild_tensor_v2"), storage()), "damaged"),
        "parameter_of_text": (
            call(name("torch._utils", "_rebuild_parameter"), text("x"), b"\x88", b"N"),
            "no tensor",
        ),
        "huge_storage": (storage(numel=huge), "declares"),
        "negative_storage": (storage(numel=-1), "no count"),
        "storage_of_text_size": (storage(numel=text("4")), "no count"),
        "storage_path": (storage(key="../../../etc/passwd"), "no number"),
        "storage_absent": (storage(key="7"), "lacks the tensor storage"),
        "storage_complex": (storage(kind="ComplexFloatStorage"), "asks for"),
        "storage_of_a_module": (
            tuple_of(
                text("storage"), name("models.vit", "Attention"), text("0"), text("cpu"), number(4)
            )
            + b"Q",
            "unknown type",
        ),
        "size_of_text": (call(name("torch", "Size"), text("abc")), "no count"),
    }
    content = {"0": bytes(16)}
    return {k: (archive(program(body), content), message) for k, (body, message) in wild.items()}
