"""Small files of binary kinds, made here."""

import io
import zipfile
from collections.abc import Sequence


def pdf(*pages: str, encrypt: str = "") -> bytes:
    """Return a PDF with a page for each text, whose lines are of ASCII.

    encrypt: an encryption dictionary; readers then ask for a password that nobody knows.
    """
    kids = " ".join(f"{4 + 2 * number} 0 R" for number in range(len(pages)))
    objects = [
        "<< /Type /Catalog /Pages 2 0 R >>",
        f"<< /Type /Pages /Kids [{kids}] /Count {len(pages)} >>",
        "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    for number, page in enumerate(pages):
        shown = " ".join(f"({line}) Tj T*" for line in page.split("\n") if line)
        drawing = f"BT /F1 12 Tf 14 TL 72 700 Td {shown} ET"
        objects += [
            "<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] "
            f"/Resources << /Font << /F1 3 0 R >> >> /Contents {5 + 2 * number} 0 R >>",
            f"<< /Length {len(drawing)} >>\nstream\n{drawing}\nendstream",
        ]
    data, places = b"%PDF-1.4\n", []
    for number, each in enumerate(objects, 1):
        places.append(len(data))
        data += f"{number} 0 obj\n{each}\nendobj\n".encode()
    table = "".join(f"{place:010d} 00000 n \n" for place in places)
    trailer = f"<< /Size {len(objects) + 1} /Root 1 0 R {encrypt} >>"
    return (
        data
        + (
            f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n{table}trailer\n{trailer}\n"
            f"startxref\n{len(data)}\n%%EOF\n"
        ).encode()
    )


ENCRYPTED = pdf(
    "secret",
    encrypt="/ID [<00><00>] /Encrypt << /Filter /Standard /V 1 /R 2 /P -4 "
    f"/O <{'41' * 32}> /U <{'42' * 32}> >>",
)


def archive(members: Sequence[tuple[str, str | bytes]]) -> bytes:
    """Return a zip archive."""
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in members:
            file.writestr(name, content)
    return written.getvalue()
