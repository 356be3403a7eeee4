"""The bill of materials of an image, as CycloneDX 1.6, from the record its build wrote."""

from __future__ import annotations

from typing import Any


def cyclonedx(record: dict[str, Any], digest: str) -> bytes:
    """Python and Debian packages as components of the image. The same record gives the same components."""
    from cyclonedx.model.bom import Bom
    from cyclonedx.model.component import Component, ComponentType
    from cyclonedx.output.json import JsonV1Dot6
    from packageurl import PackageURL

    image = record["image"]
    bom = Bom()
    name = f"radeon-stack/{image['kind']}:{image['platform']}"
    bom.metadata.component = Component(type=ComponentType.CONTAINER, name=name, version=digest, bom_ref=digest)
    for ecosystem, namespace in (("python", None), ("debian", "debian")):
        kind = "pypi" if ecosystem == "python" else "deb"
        for package, version in record["packages"][ecosystem].items():
            url = PackageURL(type=kind, namespace=namespace, name=package, version=version)
            bom.components.add(
                Component(type=ComponentType.LIBRARY, name=package, version=version, purl=url, bom_ref=url.to_string())
            )
    bom.register_dependency(bom.metadata.component, bom.components)
    return JsonV1Dot6(bom).output_as_string(indent=2).encode()
