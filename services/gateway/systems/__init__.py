"""Business systems. Adding one: a file here with its options and its client, and its options in `AnySystem`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from services.gateway.systems.file_records import FileSystem
from services.gateway.systems.odata import ODataSystem
from services.gateway.systems.odoo import OdooSystem
from services.gateway.systems.tryton import TrytonSystem

AnySystem = Annotated[TrytonSystem | OdooSystem | ODataSystem | FileSystem, Field(discriminator="type")]
"""Options of one of them, told apart by `type`."""
