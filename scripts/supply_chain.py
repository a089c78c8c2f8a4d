"""What the images hold, as a bill of materials, and whether something of it is known to be vulnerable.

    python scripts/supply_chain.py sbom     # build/sbom/IMAGE.json: CycloneDX, with the digests of locks/
    python scripts/supply_chain.py audit    # asks an advisory database; --service osv for another than PyPI's

`audit` passes only when every library was looked up; without a network it says so and fails.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from dockerfile import installations, parse

ROOT = Path(__file__).resolve().parent.parent
IMAGES = {
    "steersman": ("Dockerfile", "build"),
    "steersman-cpu": ("Dockerfile", "build-cpu"),
    "steersman-gpu": ("Dockerfile.gpu", "build"),
}
"""Dockerfile and stage that installs the libraries of each image."""
BIN = Path(sys.executable).parent


def contents(image: str) -> str:
    """Pins with digests of what an image holds, as lines of a requirements file."""
    name, stage_name = IMAGES[image]
    stages = parse(ROOT / name)
    (installation,) = (found for found in installations(stages, ROOT / "pyproject.toml") if found.stage == stage_name)
    text = "".join((ROOT / lock).read_text() for lock in installation.locks)
    steps = next(stage.steps for stage in stages if stage.name == stage_name)
    if ("ARG", "TORCH_DIGEST") in steps:  # comes from an index of its own, by a digest that the builder gives
        (torch,) = {match for _, rest in steps for match in re.findall(r"\btorch==[\d.]+", rest)}
        text = f"{torch}+cpu\n{text}"
    packages = re.split(r"^(?=[A-Za-z0-9])", re.sub(r"^#.*\n", "", text, flags=re.MULTILINE), flags=re.MULTILINE)
    return "".join(block for block in packages if block.partition("==")[0] not in installation.removed)


def bill_of(image: str, text: str) -> dict[str, Any]:
    """CycloneDX's document of an image that holds `text`, pins with digests; the same text gives the same document."""
    command = [str(BIN / "cyclonedx-py"), "requirements", "--output-reproducible", "--validate"]
    command += ["--pyproject", str(ROOT / "pyproject.toml"), "-"]
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"sbom: {image}: {(done.stderr.strip().splitlines() or ['it left no message'])[-1]}")
    bill: dict[str, Any] = json.loads(done.stdout)
    bill["metadata"]["component"]["name"] = image
    for component in bill["components"]:
        component.pop("description", None)  # repeats the line of the lock, digests and all
    return bill


def audit(image: str, service: str) -> list[str]:
    """What is wrong with an image's libraries, a sentence each; SystemExit where nothing could be asked."""
    command = [str(BIN / "pip-audit"), "--disable-pip", "--no-deps", "--progress-spinner", "off", "--format", "json"]
    command += ["--vulnerability-service", service, "-r", "/dev/stdin"]
    text = re.sub(r" \\\n\s*--hash=\S+", "", contents(image)).replace("+cpu", "")
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    try:
        found = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError):
        words = (done.stderr.strip().splitlines() or ["it left no message"])[-1]
        raise SystemExit(f"audit: {image}: {_unreached(service)}: {words[:300]}") from None
    return problems(image, service, found)


def problems(image: str, service: str, found: list[dict[str, Any]]) -> list[str]:
    """`found`: pip-audit's list of dependencies. One that was skipped was not looked at."""
    skipped = [item["name"] for item in found if item.get("skip_reason")]
    if found and len(skipped) == len(found):
        raise SystemExit(f"audit: {image}: {_unreached(service)}: it knows none of {len(found)} libraries")
    sentences = [f"{image}: {name} is not known to {service} and was not looked at" for name in skipped]
    for item in found:
        for flaw in item.get("vulns", ()):
            mend = (
                f"take {' or '.join(flaw['fix_versions'])}"
                if flaw["fix_versions"]
                else "there is no mended version yet"
            )
            sentences.append(f"{image}: {item['name']} {item['version']} has {flaw['id']}; {mend}")
    return sentences


def _unreached(service: str) -> str:
    return f"the advisory database of {service} was not reached, nothing was checked; run this where it can be"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("sbom", "audit"))
    parser.add_argument("--image", choices=tuple(IMAGES), action="append", help="one of them; repeatable")
    parser.add_argument("--service", choices=("pypi", "osv"), default="pypi", help="of audit: which database is asked")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "sbom", help="of sbom: folder")
    options = parser.parse_args()
    images = options.image or list(IMAGES)
    if options.what == "sbom":
        options.out.mkdir(parents=True, exist_ok=True)
        for image in images:
            bill = bill_of(image, contents(image))
            (options.out / f"{image}.json").write_text(json.dumps(bill, indent=1, sort_keys=True) + "\n")
            print(f"sbom  {options.out / image}.json")
        return 0
    found = [sentence for image in images for sentence in audit(image, options.service)]
    for sentence in found:
        print(f"audit: {sentence}", file=sys.stderr)
    print(f"audit  {len(images)} images, {len(found)} findings")
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main())
