"""Imports copies of the package whose libraries are broken, each in a fork of one process that has torch:
``python foreign_libraries.py FOLDER ...`` prints a line of JSON for each folder.

The folders hold a copy named segattn_ops; the program is run by its path, so that no other one is imported.
"""

import contextlib
import json
import os
import sys
import warnings

import torch
import torch.utils.flop_counter  # here what segattn_ops imports: once, not in every fork

with contextlib.suppress(ImportError):
    import fvcore.nn  # noqa: F401


def described(folder: str) -> dict:
    """What the package in the folder says of itself, and whether it computes."""
    sys.path.insert(0, folder)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        import segattn_ops
        from segattn_ops._cli import info

        x = torch.linspace(-1, 1, 96).view(1, 4, 4, 6).requires_grad_()
        outputs = [segattn_ops.position_attention(x, x, x) for _ in range(2)]
        outputs[0].sum().backward()
        with segattn_ops.use_backend("reference"):
            torch.testing.assert_close(segattn_ops.position_attention(x, x, x), outputs[0])
    assert segattn_ops.__file__.startswith(folder), "another copy was imported"
    ours = [str(one.message) for one in caught if "segattn_ops" in str(one.message)]
    config = segattn_ops.build_config()
    return {
        "warnings": ours,
        "cpu": config["cpu"],
        "page": info.page(info.describe()),
        "grad": bool(x.grad.any()),
    }


def main(folders: list[str]) -> None:
    for folder in folders:
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reader)
            try:
                answer = described(folder)
            except BaseException as error:
                answer = {"error": f"{type(error).__name__}: {error}"}
            with os.fdopen(writer, "w") as file:
                json.dump(answer, file)
            os._exit(0)
        os.close(writer)
        with os.fdopen(reader) as file:
            answer = file.read()
        _, status = os.waitpid(child, 0)
        print(json.dumps(json.loads(answer or "{}") | {"status": os.waitstatus_to_exitcode(status)}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
