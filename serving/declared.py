"""An endpoint that Ray Serve itself starts from a file (`serve deploy`, KubeRay's RayService), HTTP only.

import_path: serving.declared:application
args: {model_folder: /models/policy, weight_version: policy-1, serving: {replicas: 2}}
"""

from ray import serve

from infra.config import Settings
from serving.auth import token_digests
from serving.config import ServingSettings
from serving.deployment import ServedModel, build_application


class Declared(Settings):
    """The `args` of the file."""

    model_folder: str
    """A Hugging Face model folder, at a path that every node sees."""
    weight_version: str
    """What every answer names as the version of its weights."""
    serving: ServingSettings = ServingSettings()
    """As the `serving` section of a recipe; Serve's own file says where HTTP listens."""


def application(arguments: Declared) -> serve.Application:
    """What Serve calls.

    Raises:
        ConfigError: the tokens that the settings name are not there.
    """
    model = ServedModel(arguments.model_folder, arguments.weight_version, token_digests(arguments.serving))
    return build_application(model, arguments.serving)
