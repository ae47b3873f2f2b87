"""What lies in infra/deploy and ray_cluster.yaml fits the systems that will read it: EC2's API, KubeRay's CRDs."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

KINDS = {"RayCluster": "rayclusters", "RayJob": "rayjobs", "RayService": "rayservices"}
FILES = {"RayCluster": "raycluster.yaml", "RayJob": "rayjob.yaml", "RayService": "rayservice.yaml"}


def test_spot_ec2_takes_every_node_type(repository: Path) -> None:
    """Against the description of RunInstances that comes with botocore; Ray passes node_config on to it."""
    import boto3
    from botocore.validate import ParamValidator

    cluster = yaml.safe_load((repository / "ray_cluster.yaml").read_text())
    ec2 = boto3.client("ec2", region_name="us-west-2", aws_access_key_id="none", aws_secret_access_key="none")
    shape = ec2.meta.service_model.operation_model("RunInstances").input_shape
    assert shape is not None
    counts = {"MinCount": 1, "MaxCount": 1}
    for name, node_type in cluster["available_node_types"].items():
        report = ParamValidator().validate({**node_type["node_config"], **counts}, shape)
        assert not report.has_errors(), f"{name}: {report.generate_report()}"
    wrong = ParamValidator().validate({**counts, "InstanceMarketOptions": {"MarketTyp": "spot"}}, shape)
    assert wrong.has_errors()


@pytest.fixture(scope="module")
def schemas(repository: Path) -> dict[str, Any]:
    """Kind -> the schema of its version v1, unknown fields refused where the operator would drop them."""
    folder = Path(os.environ.get("KUBERAY_CRDS", repository.parent / "shared" / "kuberay-crds"))
    if not folder.is_dir():
        pytest.skip(f"KubeRay's CRD files are not in {folder}; name their folder in KUBERAY_CRDS")
    found = {}
    for kind, plural in KINDS.items():
        with (folder / f"ray.io_{plural}.yaml").open() as file:
            definition = yaml.load(file, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        [version] = [version for version in definition["spec"]["versions"] if version["name"] == "v1"]
        schema = version["schema"]["openAPIV3Schema"]
        schema["properties"]["metadata"]["x-kubernetes-preserve-unknown-fields"] = True
        found[kind] = strict(schema)
    return found


def strict(schema: Any) -> Any:
    """Kubernetes' dialect in JSON Schema's words: no unknown fields, int-or-string, nullable."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, Mapping):
        return schema
    out = {key: strict(value) for key, value in schema.items() if key not in ("default", "example", "description")}
    if isinstance(schema.get("properties"), Mapping):
        out["properties"] = {name: strict(value) for name, value in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields") and "additionalProperties" not in schema:
            out["additionalProperties"] = False
    if schema.get("x-kubernetes-int-or-string"):
        out.pop("type", None)
        out["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    if schema.get("nullable") and "type" in out:
        out["type"] = [out["type"], "null"]
    return out


def problems(document: Any, schema: Any) -> list[str]:
    from jsonschema import Draft7Validator

    return [f"{error.json_path}: {error.message[:200]}" for error in Draft7Validator(schema).iter_errors(document)]


def load(repository: Path, kind: str) -> dict[str, Any]:
    """The one object of that kind in its file."""
    text = (repository / "infra/deploy/kuberay" / FILES[kind]).read_text()
    [found] = [document for document in yaml.safe_load_all(text) if document["kind"] == kind]
    return dict(found)


@pytest.mark.parametrize("kind", KINDS)
def test_spot_kuberay_takes_the_file(repository: Path, schemas: dict[str, Any], kind: str) -> None:
    document = load(repository, kind)
    assert document["apiVersion"] == "ray.io/v1"
    assert problems(document, schemas[kind]) == []


@pytest.mark.parametrize("kind", KINDS)
def test_spot_kuberay_schema_refuses_what_is_wrong(repository: Path, schemas: dict[str, Any], kind: str) -> None:
    """A misspelt field deep in a pod, and a value of another type: else the test above would prove nothing."""
    misspelt, mistyped = load(repository, kind), load(repository, kind)
    pod_of(misspelt)["containers"][0]["imagePullPolice"] = "Always"
    assert any("imagePullPolice" in line for line in problems(misspelt, schemas[kind]))
    cluster_of(mistyped)["workerGroupSpecs"][0]["maxReplicas"] = "many"
    assert any("many" in line for line in problems(mistyped, schemas[kind]))


@pytest.mark.parametrize("kind", KINDS)
def test_spot_kuberay_workers_are_spot_and_leave_politely(repository: Path, kind: str) -> None:
    """No head on a spot machine; a spot pod is drained in Ray before it stops, within its grace period."""
    import ray

    cluster = cluster_of(load(repository, kind))
    assert cluster["rayVersion"] == ray.__version__
    assert "nodeSelector" not in cluster["headGroupSpec"]["template"]["spec"]
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert len({group["groupName"] for group in cluster["workerGroupSpecs"]}) == len(cluster["workerGroupSpecs"]) >= 2
    spot = [group["template"]["spec"] for group in cluster["workerGroupSpecs"] if group["groupName"].startswith("spot")]
    assert spot
    for pod in spot:
        assert "cloud.google.com/gke-spot" in pod["nodeSelector"]
        [container] = pod["containers"]
        hook = container["lifecycle"]["preStop"]["exec"]["command"][-1]
        assert "ray drain-node" in hook and "DRAIN_NODE_REASON_PREEMPTION" in hook
        said = int(hook.partition("--deadline-remaining-seconds ")[2].split(";")[0])
        assert said <= int(hook.rpartition("sleep ")[2]) < pod["terminationGracePeriodSeconds"]
        [memory] = [volume for volume in pod["volumes"] if volume["name"] == "memory"]
        assert memory["emptyDir"]["medium"] == "Memory"  # snapshots lie there; a pod has 64 MiB by itself
        assert {"name": "memory", "mountPath": "/dev/shm"} in container["volumeMounts"]


def test_spot_drain_command_is_one_of_ray() -> None:
    """The hook's words, against the installed Ray (its help is printed without a cluster)."""
    from click.testing import CliRunner
    from ray.scripts.scripts import cli

    shown = CliRunner().invoke(cli, ["drain-node", "--help"]).output
    for word in ("--reason ", "--reason-message", "--deadline-remaining-seconds", "DRAIN_NODE_REASON_PREEMPTION"):
        assert word in shown


def test_spot_rayservice_names_an_application_that_serve_can_build(repository: Path) -> None:
    from ray.serve._private.api import call_user_app_builder_with_args_if_necessary
    from ray.serve.schema import ServeDeploySchema

    from serving.declared import application

    config = ServeDeploySchema.model_validate(yaml.safe_load(load(repository, "RayService")["spec"]["serveConfigV2"]))
    [declared] = config.applications
    assert declared.import_path == f"{application.__module__}:{application.__name__}"
    call_user_app_builder_with_args_if_necessary(application, declared.args)
    with pytest.raises(ValueError, match="replicaz"):
        call_user_app_builder_with_args_if_necessary(application, {**declared.args, "serving": {"replicaz": 2}})


def cluster_of(document: Mapping[str, Any]) -> dict[str, Any]:
    spec = document["spec"]
    return dict(spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec)


def pod_of(document: Mapping[str, Any]) -> dict[str, Any]:
    return dict(cluster_of(document)["headGroupSpec"]["template"]["spec"])
