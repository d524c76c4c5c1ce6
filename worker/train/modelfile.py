"""A Modelfile: how Ollama makes a model of a GGUF file that lies beside it.

Ollama reads the chat template and the tokens that end an answer from the GGUF file, so neither is written here a second
time in Ollama's own template language, which no Jinja template is turned into.
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
