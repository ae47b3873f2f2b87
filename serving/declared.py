"""An endpoint that Ray Serve itself starts from a file (`serve deploy`, KubeRay's RayService). HTTP only.

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
    """The version of the weights, which every answer names."""
    serving: ServingSettings = ServingSettings()
    """As the `serving` section of a recipe, but Serve's own file sets the HTTP address."""


def application(arguments: Declared) -> serve.Application:
    """Build the application; Serve calls this.

    Raises:
        ConfigError: the tokens that the settings name cannot be read.
    """
    model = ServedModel(arguments.model_folder, arguments.weight_version, token_digests(arguments.serving))
    return build_application(model, arguments.serving)
