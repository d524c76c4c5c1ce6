"""The error envelope in OpenAI's form."""

from __future__ import annotations

from pydantic import ConfigDict, Field

from api.views.view import View


class ErrorBody(View):
    message: str = Field(description="What is wrong, with field, value and remedy.")
    type: str = Field(examples=["invalid_request_error"])
    param: str | None = Field(examples=["training_file"])
    code: str | None = Field(examples=["missing_required_parameter"])


class ErrorEnvelope(View):
    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "error": {
                        "message": "Missing required parameter: 'training_file'.",
                        "type": "invalid_request_error",
                        "param": "training_file",
                        "code": "missing_required_parameter",
                    }
                }
            ]
        }
    )

    error: ErrorBody
