"""Four tasks of labelled text, made of what a Debian machine has.

Each function returns the names of the classes and a list of (text, class, group); texts of one
group never end up on both sides of a split.
"""

import gettext
import random
import re
import subprocess
from pathlib import Path

SECTIONS = "admin devel doc games graphics libs net science sound text utils x11".split()
LANGUAGES = "ca de es fr id it pl pt_PT sv tr vi en".split()
WORDNET = Path("/usr/share/wordnet")
# Files of WordNet's lexicographers, by number: lexnames(5).
NOUNS = {
    "04": "act", "05": "animal", "06": "artifact", "07": "attribute", "09": "cognition",
    "10": "communication", "13": "food", "14": "group", "15": "location", "18": "person",
    "20": "plant", "26": "state",
}  # fmt: skip


def section():
    """Short description of a package -> its section; packages of one source are one group."""
    control = subprocess.run(
        ["apt-cache", "dumpavail"], check=True, capture_output=True, text=True, errors="replace"
    ).stdout
    texts = {}
    for stanza in control.split("\n\n"):
        fields = dict(re.findall(r"^(Package|Source|Section|Description): (.*)$", stanza, re.M))
        if fields.get("Section") in SECTIONS and "Description" in fields:
            group = fields.get("Source", fields["Package"]).split()[0]
            texts[fields["Description"]] = (SECTIONS.index(fields["Section"]), group)
    return SECTIONS, [(text, label, group) for text, (label, group) in texts.items()]


def glosses(file):
    """Yield the lexicographer's file, the definition and the usage examples of every synset."""
    for line in (WORDNET / file).read_text(errors="replace").splitlines():
        if line.startswith("  "):  # the licence
            continue
        gloss = line.split(" | ", 1)[1]
        examples = re.findall(r'"([^"]+)"', gloss)
        yield line.split()[1], gloss.split('; "')[0].strip(), examples


def meaning():
    """Definition of a noun in WordNet -> what kind of thing it is."""
    classes = list(NOUNS.values())
    texts = {
        definition: classes.index(NOUNS[file])
        for file, definition, _ in glosses("data.noun")
        if file in NOUNS
    }
    return classes, [(text, label, text) for text, label in texts.items()]


def order():
    """Usage example in WordNet -> as it was, or with two neighbouring words swapped."""
    generator = random.Random(11)
    examples = {
        example
        for file in ("data.verb", "data.adj", "data.noun", "data.adv")
        for _, _, found in glosses(file)
        for example in found
        if 5 <= len(example.split()) <= 20
    }
    texts = []
    for example in sorted(examples):
        words = example.split()
        label = generator.randrange(2)
        if label:
            # The last word often carries a full stop, which would give the swap away.
            first = generator.randrange(len(words) - 2)
            if words[first].lower() == words[first + 1].lower():
                continue
            words[first : first + 2] = words[first + 1], words[first]
        texts.append((" ".join(words), label, example))
    return ["as it was", "swapped"], texts


def language():
    """Message of git -> its language; translations of one message are one group."""
    messages = {}
    for code in LANGUAGES[:-1]:
        with open(f"/usr/share/locale/{code}/LC_MESSAGES/git.mo", "rb") as file:
            messages[code] = gettext.GNUTranslations(file)._catalog
    messages["en"] = {key: key for key in messages["de"]}
    texts = {}
    for label, code in enumerate(LANGUAGES):
        for key, text in messages[code].items():
            if not isinstance(key, str) or not key or (code != "en" and text == key):
                continue
            if len(re.findall(r"[^\W\d_]{2,}", text)) >= 4:
                texts[" ".join(text.split())] = (label, key)
    return LANGUAGES, [(text, label, key) for text, (label, key) in texts.items()]


TASKS = {"section": section, "meaning": meaning, "order": order, "language": language}
