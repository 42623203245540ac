"""Watts of one busy logical CPU by processor: what the CPU-time meter multiplies seconds by.

watts per core = thermal design power / logical CPUs. The kernel accounts CPU time to logical CPUs, and a
virtual machine's vCPU is one, so a fully loaded package comes out at its TDP. Each family is represented by
its largest widely sold part, whose published figures stand in the row. Where a maker publishes no TDP the
row names the measurement or the sibling part it was taken from and says so.
"""

from __future__ import annotations

import platform
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple


class Family(NamedTuple):
    """Processors of one make: a pattern for the model name, watts, logical CPUs, and the source of both."""

    pattern: str
    watts: float
    cpus: int
    source: str

    @property
    def watts_per_core(self) -> float:
        return self.watts / self.cpus


class PowerFigure(NamedTuple):
    """Watts of a busy logical CPU and where the figure comes from, in words for `calm doctor`."""

    watts_per_core: float
    source: str


ARK = "Intel ARK"
AMD = "AMD product page"

# The first pattern that is found in the name (case ignored) decides, so narrow ones stand above wide ones.
FAMILIES: tuple[Family, ...] = (
    # AMD EPYC; hypervisors say "AMD EPYC-Milan Processor" where the metal says "AMD EPYC 7763".
    Family(r"EPYC.(9\w\d5|Turin)", 500, 256, f"{AMD}: EPYC 9755"),
    Family(r"EPYC.(97\d4|Bergamo)", 360, 256, f"{AMD}: EPYC 9754"),
    Family(r"EPYC.(9\w\d4|8\d\d4|Genoa)", 360, 192, f"{AMD}: EPYC 9654"),
    Family(r"EPYC.(7\d\w3|Milan)", 280, 128, f"{AMD}: EPYC 7763"),
    Family(r"EPYC.(7\w\w2|Rome)", 225, 128, f"{AMD}: EPYC 7742"),
    Family(r"EPYC.(7\d\d1|Naples)|EPYC Processor", 180, 64, f"{AMD}: EPYC 7601"),
    Family(r"EPYC", 280, 128, f"{AMD}: EPYC 7763, for an EPYC of unknown generation"),
    # AMD Ryzen
    Family(r"Threadripper", 280, 64, f"{AMD}: Ryzen Threadripper 3970X"),
    Family(r"Ryzen.*\d{4}(U|HS|H)\b|Ryzen AI", 28, 16, f"{AMD}: Ryzen 7 7840U"),
    Family(r"Ryzen 9 [79]\d{3}", 170, 32, f"{AMD}: Ryzen 9 7950X"),
    Family(r"Ryzen 9", 105, 32, f"{AMD}: Ryzen 9 5950X"),
    Family(r"Ryzen [57]", 65, 12, f"{AMD}: Ryzen 5 5600X"),
    Family(r"Ryzen", 65, 8, f"{AMD}: Ryzen 3 3100"),
    # Intel Xeon
    Family(r"Xeon.*(v4|Broadwell)", 120, 28, f"{ARK}: Xeon E5-2680 v4"),
    Family(r"Xeon.*(v[23]|Haswell)", 120, 24, f"{ARK}: Xeon E5-2680 v3"),
    Family(r"Xeon.*(\b69\d\dP|\b67\d\dP|GraniteRapids)", 500, 256, f"{ARK}: Xeon 6980P"),
    Family(r"Xeon.*([3-8]5\d\d|EmeraldRapids)", 350, 128, f"{ARK}: Xeon Platinum 8592+"),
    Family(r"Xeon.*([3-8]4\d\d|SapphireRapids)", 350, 112, f"{ARK}: Xeon Platinum 8480+"),
    Family(r"Xeon.*([3-8]3\d\d|Icelake)", 270, 80, f"{ARK}: Xeon Platinum 8380"),
    Family(r"Xeon.*([3-8]2\d\d|Cascadelake)", 205, 56, f"{ARK}: Xeon Platinum 8280"),
    Family(r"Xeon.*((Platinum|Gold|Silver|Bronze) \d1\d\d|Skylake)", 205, 56, f"{ARK}: Xeon Platinum 8180"),
    Family(r"Xeon", 270, 80, f"{ARK}: Xeon Platinum 8380, for a Xeon of unknown generation"),
    # Intel Core
    Family(r"Core.*Ultra.*\d{3}[UHV]", 28, 22, f"{ARK}: Core Ultra 7 155H"),
    Family(r"Core.*Ultra", 125, 24, f"{ARK}: Core Ultra 9 285K"),
    Family(r"Core.*i\d-1[1-4]\d{2,3}(G\d|[UPH])", 28, 16, f"{ARK}: Core i7-1260P"),
    Family(r"Core.*i\d-\d{4,5}(U|G\d|Y)", 15, 8, f"{ARK}: Core i7-8565U"),
    Family(r"Core.*i\d-1[34]\d{3}", 125, 32, f"{ARK}: Core i9-13900K"),
    Family(r"Core.*i\d-12\d{3}", 125, 24, f"{ARK}: Core i9-12900K"),
    Family(r"Core.*i[3579]-", 95, 12, f"{ARK}: Core i7-8700K"),
    Family(r"\b(N[0-9]{2,3}|N-series|Celeron|Pentium)\b", 6, 4, f"{ARK}: Processor N100"),
    # Arm servers: no SMT, a logical CPU is a core. AWS publishes no TDP for Graviton.
    Family(r"Altra|Neoverse-N1|Graviton2", 250, 80, "Ampere product brief: Altra Q80-33 (Neoverse-N1)"),
    Family(
        r"Neoverse-V2|Grace|Graviton4|Axion", 500, 144, "NVIDIA data sheet: Grace CPU Superchip, with memory"
    ),
    Family(r"Neoverse-V[13]|Graviton", 250, 80, "no TDP published; as Altra Q80-33"),
    Family(r"Neoverse|Cobalt|AmpereOne", 350, 192, "Ampere product brief: AmpereOne A192-32X"),
    # Apple: no TDP published; whole-machine maximum from Apple's power table, GPU included.
    Family(r"Apple", 39, 8, "Apple support 'Mac mini power consumption': M1 at full load, whole machine"),
    # Raspberry Pi: whole board at 400 % CPU.
    Family(
        r"Raspberry Pi 5|Cortex-A76", 8.0, 4, "about; boards under stress-ng, published tests differ by 1 W"
    ),
    Family(r"Raspberry Pi (4|400)|Cortex-A72", 6.4, 4, "pidramble.com: Pi 4 B, stress --cpu 4"),
    Family(r"Raspberry Pi|Cortex-A53", 3.7, 4, "pidramble.com: Pi 3 B, stress --cpu 4"),
)

# Used when nothing matches: the middle of the server rows above (1.4 to 5 W).
DEFAULT_WATTS_PER_CORE = 3.0

# Hypervisors often hide the name; family and model numbers then tell the generation (CPUID).
SIGNATURES: Mapping[tuple[str, int, int], str] = {
    ("AuthenticAMD", 23, 1): "AMD EPYC-Naples",
    ("AuthenticAMD", 23, 49): "AMD EPYC-Rome",
    ("AuthenticAMD", 25, 1): "AMD EPYC-Milan",
    ("AuthenticAMD", 25, 17): "AMD EPYC-Genoa",
    ("AuthenticAMD", 25, 160): "AMD EPYC-Bergamo",
    ("AuthenticAMD", 26, 2): "AMD EPYC-Turin",
    ("GenuineIntel", 6, 63): "Intel Xeon (Haswell)",
    ("GenuineIntel", 6, 79): "Intel Xeon (Broadwell)",
    ("GenuineIntel", 6, 85): "Intel Xeon (Skylake)",
    ("GenuineIntel", 6, 106): "Intel Xeon (Icelake)",
    ("GenuineIntel", 6, 143): "Intel Xeon (SapphireRapids)",
    ("GenuineIntel", 6, 173): "Intel Xeon (GraniteRapids)",
    ("GenuineIntel", 6, 207): "Intel Xeon (EmeraldRapids)",
}  # fmt: skip

# Part numbers of Arm's main ID register, implementer 0x41.
ARM_PARTS: Mapping[str, str] = {
    "0xd03": "Cortex-A53",
    "0xd08": "Cortex-A72",
    "0xd0b": "Cortex-A76",
    "0xd0c": "Neoverse-N1",
    "0xd40": "Neoverse-V1",
    "0xd49": "Neoverse-N2",
    "0xd4f": "Neoverse-V2",
    "0xd84": "Neoverse-V3",
    "0xd8e": "Neoverse-N3",
}

GENERIC_NAME = re.compile(r"^(Intel\(R\) Xeon\(R\) (Processor|CPU)|AMD EPYC( Processor)?)( @.*)?$")


def power_figure(watts_per_core: float | None, proc_root: Path) -> PowerFigure:
    """The operator's figure, else the table's, else the default; each says where it comes from."""
    if watts_per_core is not None:
        return PowerFigure(watts_per_core, "the operator's figure")
    name = processor_name(proc_root)
    family = match(name)
    if family is None:
        return PowerFigure(
            DEFAULT_WATTS_PER_CORE, f"default; processor {name or 'unknown'!r} is not in the table"
        )
    source = f"{name}: {family.watts:g} W / {family.cpus} logical CPUs ({family.source})"
    return PowerFigure(family.watts_per_core, source)


def match(name: str) -> Family | None:
    return next((family for family in FAMILIES if re.search(family.pattern, name, re.IGNORECASE)), None)


def processor_name(proc_root: Path) -> str:
    """A name the table can be searched for; empty where the system does not tell."""
    try:
        return name_from_cpuinfo((proc_root / "cpuinfo").read_text(errors="replace"))
    except OSError:
        return apple_name() if platform.system() == "Darwin" else platform.processor()


def name_from_cpuinfo(text: str) -> str:
    """The model name; a hidden one is replaced by what CPUID's or Arm's numbers say."""
    fields = {key.strip(): value.strip() for key, _, value in map(split_line, text.splitlines())}
    name = fields.get("model name") or fields.get("Model") or ""
    if GENERIC_NAME.match(name):
        return SIGNATURES.get(signature(fields), name)
    if not name or name.startswith("ARM"):
        return ARM_PARTS.get(fields.get("CPU part", ""), name)
    return name


def split_line(line: str) -> tuple[str, str, str]:
    return line.partition(":")


def signature(fields: Mapping[str, str]) -> tuple[str, int, int]:
    try:
        return fields["vendor_id"], int(fields["cpu family"]), int(fields["model"])
    except (KeyError, ValueError):
        return "", 0, 0


def apple_name() -> str:
    command = ("/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string")
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=2, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return platform.processor()
