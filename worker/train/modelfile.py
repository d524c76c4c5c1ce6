"""A Modelfile: how Ollama makes a model of a GGUF file that lies beside it.

Ollama reads the chat template and the end tokens from the GGUF file. So neither is written here a second time:
Ollama's own template language differs from Jinja, and nothing translates one into the other.
"""

from __future__ import annotations

from shared.contract.merge_request import CreateExport
from shared.contract.spec import BaseModelRef


def modelfile(request: CreateExport, file: str, *, base: BaseModelRef) -> str:
    """The text. Of an adapter, `FROM` names a file that the user must bring: its base as GGUF."""
    if request.format == "gguf":
        return f"# ollama create NAME -f Modelfile\nFROM ./{file}\n"
    return (
        f"# The adapter needs {base.public_name} (revision {base.revision}) as GGUF: write the path of that file,\n"
        "# or the name of a model of Ollama that has these weights, behind FROM.\n"
        f"FROM ./base.gguf\nADAPTER ./{file}\n"
    )
