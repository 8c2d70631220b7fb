"""Running compiled parts inside the models that they came from."""

from fhe_fx.runtime.client import ClientModule, ClientRegion
from fhe_fx.runtime.module import EncryptedModule
from fhe_fx.runtime.region import MODES, Region

__all__ = ["MODES", "ClientModule", "ClientRegion", "EncryptedModule", "Region"]
