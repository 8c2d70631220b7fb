"""Artefacts: an encrypted region as a directory that runs without the model."""

from fhe_fx.export.artifact import FILES, Artifact, load_artifact
from fhe_fx.export.bundle import (
    ClientBundle,
    ServerBundle,
    load_client_bundle,
    load_client_bundles,
    load_server_bundle,
)
from fhe_fx.export.cache import Cache
from fhe_fx.export.directory import check_destination
from fhe_fx.export.manifest import MANIFEST, read_artefacts, read_manifest, read_stated
from fhe_fx.export.model import check_apart, save
from fhe_fx.export.pretrained import load_client_model
from fhe_fx.export.region import export_region

__all__ = [
    "FILES",
    "MANIFEST",
    "Artifact",
    "Cache",
    "ClientBundle",
    "ServerBundle",
    "check_apart",
    "check_destination",
    "export_region",
    "load_artifact",
    "load_client_bundle",
    "load_client_bundles",
    "load_client_model",
    "load_server_bundle",
    "read_artefacts",
    "read_manifest",
    "read_stated",
    "save",
]
