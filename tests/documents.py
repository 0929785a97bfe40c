"""Documents for every test, written by hand: whole ones, damaged ones, and hostile ones."""

import io
from collections.abc import Mapping, Sequence

from PIL import Image

A4 = (595, 842)  # points


def pdf(
    texts: Sequence[str],
    size: tuple[float, float] = A4,
    sizes: Mapping[int, tuple[float, float]] | None = None,
    content: bytes | None = None,
    objects: Sequence[bytes] = (),
    resources: bytes = b"",
    trailer: bytes = b"",
) -> bytes:
    """A PDF with a page for each text, in large letters.

    sizes: of pages that have another size, by number. content: of every page instead of its text.
    objects: more of them, numbered from 4; resources: what the pages name of them. trailer: more
    of its keys.
    """
    first = 4 + len(objects)
    kids = b" ".join(b"%d 0 R" % (first + 2 * i) for i in range(len(texts)))
    bodies = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [%s] /Count %d >>" % (kids, len(texts)),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
        *objects,
    ]
    for i, text in enumerate(texts):
        width, height = (sizes or {}).get(i + 1, size)
        drawn = content or b"BT /F 48 Tf 40 %d Td (%s) Tj ET" % (height // 2, text.encode())
        bodies += [
            b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 %g %g] /Contents %d 0 R "
            b"/Resources << /Font << /F 3 0 R >> %s >> >>"
            % (width, height, first + 2 * i + 1, resources),
            stream(drawn),
        ]
    return _file(bodies, trailer)


def stream(data: bytes, keys: bytes = b"") -> bytes:
    """The body of an object that holds bytes."""
    return b"<< /Length %d %s >>\nstream\n%s\nendstream" % (len(data), keys, data)


def _file(bodies: Sequence[bytes], trailer: bytes) -> bytes:
    out = io.BytesIO(b"%PDF-1.7\n")
    out.seek(0, io.SEEK_END)
    offsets = []
    for number, body in enumerate(bodies, 1):
        offsets.append(out.tell())
        out.write(b"%d 0 obj\n%s\nendobj\n" % (number, body))
    start = out.tell()
    out.write(b"xref\n0 %d\n0000000000 65535 f \n" % (len(bodies) + 1))
    out.write(b"".join(b"%010d 00000 n \n" % offset for offset in offsets))
    keys = b"/Size %d /Root 1 0 R %s" % (len(bodies) + 1, trailer)
    out.write(b"trailer << %s >>\nstartxref\n%d\n%%%%EOF\n" % (keys, start))
    return out.getvalue()


def encrypted_pdf() -> bytes:
    """Asks for a password that nobody knows."""
    guard = b"/Filter /Standard /V 2 /R 3 /Length 128 /P -4 /O <%s> /U <%s>"
    id_ = b"00" * 16
    keys = guard % (b"4a" * 32, b"5b" * 32)
    return pdf(["secret"], trailer=b"/Encrypt << %s >> /ID [<%s> <%s>]" % (keys, id_, id_))


def endless_pdf(pages: int = 1) -> bytes:
    """Drawings that draw ten drawings each, twelve levels deep: a page takes days to render."""
    levels = 12
    form = b"/Type /XObject /Subtype /Form /BBox [0 0 595 842]"
    last = stream(b"0 0 10 10 re f " * 10, form)
    drawings = [
        stream(b"/D Do " * 10, form + b" /Resources << /XObject << /D %d 0 R >> >>" % (number + 1))
        for number in range(4, 4 + levels)
    ]
    names = b"/XObject << /D 4 0 R >>"
    return pdf(["x"] * pages, content=b"/D Do", objects=[*drawings, last], resources=names)


def tiff(frames: Sequence[Image.Image], **options: object) -> bytes:
    buffer = io.BytesIO()
    frames[0].save(buffer, "TIFF", save_all=True, append_images=list(frames[1:]), **options)
    return buffer.getvalue()
