"""A PDF's pages as images. Runs in the child process only: PDFium may crash or hang on any page."""

from contextlib import suppress
from pathlib import Path

import pypdfium2 as pdfium
import pypdfium2.raw as pdfium_c
from PIL import Image, ImageChops

from pipeline.render.settings import PageSettings, page_pixels
from schemas.errors import Reason, RowError

_WHITE = (255, 255, 255, 255)
_REASONS = {
    pdfium_c.FPDF_ERR_PASSWORD: Reason.ENCRYPTED,
    pdfium_c.FPDF_ERR_SECURITY: Reason.ENCRYPTED,
    pdfium_c.FPDF_ERR_FILE: Reason.EMPTY_SOURCE,  # see _forget_last_error
}


class Pdf:
    """`pages` of them, from 1. Raises RowError: ENCRYPTED, EMPTY_SOURCE, SOURCE_DAMAGED."""

    broken: str | None = None  # PDFium finds all the pages there are, or none

    def __init__(self, path: Path, settings: PageSettings) -> None:
        self._settings = settings
        _forget_last_error()
        try:
            self._document = pdfium.PdfDocument(path)
        except pdfium.PdfiumError as error:
            reason = _REASONS.get(error.err_code or 0, Reason.SOURCE_DAMAGED)
            what = "no page in it" if reason is Reason.EMPTY_SOURCE else str(error)
            raise RowError(reason, f"cannot be opened as a PDF: {what}") from error
        with suppress(pdfium.PdfiumError):
            self._document.init_forms()  # else what was filled into a form is not drawn
        self.pages = len(self._document)

    def size(self, number: int) -> tuple[int, int]:
        """(width, height) in pixels of the image of a page. Raises RowError."""
        try:
            points = self._document.get_page_size(number - 1)  # does not look at what is drawn
        except pdfium.PdfiumError as error:
            raise RowError(Reason.PAGE_DAMAGED, f"cannot be loaded: {error}") from error
        return page_pixels(*points, self._settings)

    def image(self, number: int) -> Image.Image:
        """The page on white, its annotations and form fields too, in mode RGB, or L if it is grey.

        Raises RowError.
        """
        page = self._page(number)
        try:
            return _without_colours(self._render(page))
        except pdfium.PdfiumError as error:
            raise RowError(Reason.PAGE_DAMAGED, f"cannot be rendered: {error}") from error
        finally:
            page.close()

    def close(self) -> None:
        self._document.close()

    def _page(self, number: int) -> pdfium.PdfPage:
        try:
            return self._document[number - 1]
        except pdfium.PdfiumError as error:
            raise RowError(Reason.PAGE_DAMAGED, f"cannot be loaded: {error}") from error

    def _render(self, page: pdfium.PdfPage) -> Image.Image:
        """To the pixel: PdfPage.render takes a scale, which rounds each side up."""
        width, height = page_pixels(page.get_width(), page.get_height(), self._settings)
        bitmap = pdfium.PdfBitmap.new_native(width, height, pdfium_c.FPDFBitmap_BGR)
        bitmap.fill_rect(_WHITE, 0, 0, width, height)
        where = (bitmap, page, 0, 0, width, height, 0, pdfium_c.FPDF_ANNOT)
        pdfium_c.FPDF_RenderPageBitmap(*where)
        if self._document.formenv:
            pdfium_c.FPDF_FFLDraw(self._document.formenv, *where)
        return bitmap.to_pil()


def _forget_last_error() -> None:
    """PDFium sets no error for a document without pages, and would tell that of the document
    before. It now tells of a file that is not there, which ours is: the worker has read of it.
    """
    pdfium_c.FPDF_LoadDocument(b"/dev/null/none", None)


def _without_colours(image: Image.Image) -> Image.Image:
    """The same pixels; as one channel most pages cost a third to encode and to cut."""
    red, green, blue = image.split()
    same = not ImageChops.difference(red, green).getbbox()
    return red if same and not ImageChops.difference(green, blue).getbbox() else image
