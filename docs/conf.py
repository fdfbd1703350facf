"""The documentation site: Sphinx, since docstrings are in its markup; tutorials are run when it is built."""

import os
import re
from importlib.metadata import version as version_of

from docutils import nodes
from sphinx import addnodes

os.environ.setdefault("OMP_NUM_THREADS", "1")  # small tutorials: threads would cost more than they give

project = "pyro-nbvae"
author = "pyro-nbvae contributors"
copyright = f"2026, {author}"
release = version_of("pyro-nbvae")
extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx_copybutton",
    "myst_nb",
]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "pyro-nbvae"

myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence", "deflist"]
myst_heading_anchors = 3
nb_execution_mode = "cache"
nb_execution_timeout = 300
nb_execution_raise_on_error = True
nb_merge_streams = True
copybutton_exclude = ".linenos, .gp, .go"

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_default_options = {"show-inheritance": True}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_custom_sections = [("Reference", "notes_style")]
napoleon_use_ivar = True


_STARRED = "event_shape|latent_shape|options|parameters|rest|args|kwargs"


def _escape(app, what, name, obj, options, lines):
    """Docstrings write shapes as (B, *event_shape) and absolute values as |l|, which the markup takes for its own."""
    for k, line in enumerate(lines):
        if not line.lstrip().startswith((">>>", "...")):
            line = re.sub(rf"(?<![\\*])(\*{{1,2}})(?=({_STARRED})\b)", r"\\\1", line)
            lines[k] = line.replace(r"\**", r"\*\*").replace("|l|", r"\|l\|")


def _add_summary(app, what, name, obj, options, lines):
    """The page of a module begins with a table of its members."""
    if what != "module":
        return
    members = options.get("members")
    if not isinstance(members, (list, tuple, set)):  # all of them
        defined = [key for key, one in vars(obj).items() if getattr(one, "__module__", None) == name]
        members = getattr(obj, "__all__", [key for key in defined if not key.startswith("_")])
    described = [key for key in members if getattr(vars(obj).get(key), "__doc__", None) and callable(vars(obj)[key])]
    lines += ["", ".. autosummary::", "   :nosignatures:", "", *(f"   {key}" for key in described), ""]


_MATH = "mathematics"
_PAGE = re.compile(r"docs/(\w+)\.md(?:, sections? ([\d.]*\d))?")


def _objects(env):
    """The documented names: in full, and the last part where it can only mean one class or function."""
    found = env.domains["py"].objects
    last = {}
    for name, entry in found.items():
        short = name.rpartition(".")[2]
        # train is also a command, Poisson also a distribution of Pyro
        specific = "_" in short or (entry.objtype in ("class", "exception") and re.search("[a-z][A-Z]", short))
        if specific and not entry.aliased:
            last.setdefault(short, set()).add(name)
    return {name: name for name in found} | {short: names.pop() for short, names in last.items() if len(names) == 1}


def _link(app, docname, text, target, anchor):
    uri = app.builder.get_relative_uri(docname, target) + (f"#{anchor}" if anchor else "")
    return nodes.reference("", "", text, internal=True, refuri=uri)


def _link_names(app, doctree, docname):
    """Code that is the name of a documented object, and ``docs/PAGE.md, section N`` in a docstring, become links."""
    names = _objects(app.env)
    for literal in list(doctree.findall(nodes.literal)):
        name = literal.astext().removesuffix("()")
        inside = (nodes.reference, nodes.title, addnodes.pending_xref, addnodes.desc_signature)
        if name in names and not any(isinstance(node, inside) for node in _ancestors(literal)):
            entry = app.env.domains["py"].objects[names[name]]
            literal.replace_self(_link(app, docname, literal.deepcopy(), entry.docname, entry.node_id))
    pattern = (
        re.compile(_PAGE.pattern + r"|(?<=sections )[\d.]*\d|(?<=section )[\d.]*\d") if docname == _MATH else _PAGE
    )
    for text in list(doctree.findall(nodes.Text)):
        if isinstance(text.parent, (nodes.reference, nodes.title)):
            continue
        pieces, end = [], 0
        for match in pattern.finditer(text):
            page, number = match.groups() if match[1] else (_MATH, match[0])
            if page in app.env.all_docs:
                anchor = _section(app.env, page, number) if number else ""
                shown = nodes.inline("", match[0].replace("docs/", "").replace(".md", ""))
                pieces += [nodes.Text(text[end : match.start()]), _link(app, docname, shown, page, anchor)]
                end = match.end()
        if pieces:
            text.parent.replace(text, [*pieces, nodes.Text(text[end:])])


def _ancestors(node):
    while node.parent is not None:
        node = node.parent
        yield node


def _section(env, page, number):
    """The anchor of the section of a page whose title begins with this number."""
    for section in env.get_doctree(page).findall(nodes.section):
        if section[0].astext().split()[0].rstrip(".") == number:
            return section["ids"][0]
    return ""


def setup(app):
    app.connect("autodoc-process-docstring", _add_summary, priority=100)
    app.connect("autodoc-process-docstring", _escape, priority=900)
    app.connect("doctree-resolved", _link_names)
