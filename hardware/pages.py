"""The HTML page that staircases and histories are drawn on: one file, no scripts, no links."""

from html import escape

STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --ink: #18201c; --muted: #56615b;
  --rule: #dbe0dd; --line: #1c6b48; --bad: #a3291c; }
@media (prefers-color-scheme: dark) { :root { --paper: #121614; --ink: #e6ebe8; --muted: #9faba5;
  --rule: #313a35; --line: #69c596; --bad: #ff8f80; } }
body { margin: 0 auto; padding: 2.5rem 1.5rem 5rem; max-width: 63rem; background: var(--paper);
  color: var(--ink); font: 1rem/1.55 system-ui, sans-serif; font-variant-numeric: tabular-nums; }
h1 { font-size: 1.35rem; } h2 { font-size: 1rem; margin: 2.5rem 0 0; overflow-wrap: anywhere; }
p, td, th { font-size: .875rem; } p, th { color: var(--muted); }
svg { display: block; width: 100%; height: auto; }
text { fill: var(--muted); font-size: .65rem; } /* of the chart, which is drawn larger */
table { border-collapse: collapse; } th, td { padding: .3rem 1.5rem .3rem 0; text-align: left;
  border-bottom: 1px solid var(--rule); } .changed { color: var(--bad); }
"""


def html_page(title: str, body: str) -> str:
    """Return a page with its title as the heading; `body` is HTML."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{escape(title)}</h1>\n{body}\n</body>\n</html>\n"
    )


def legible(value: float) -> str:
    """Return a number of three digits, or whole, without an exponent: 0.0123, 1.23, 2,711."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
