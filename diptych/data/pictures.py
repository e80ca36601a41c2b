"""Pictures from files, tars and tables: in RGB, or the fault that keeps them from being used."""

from __future__ import annotations

import errno
import warnings
from contextlib import suppress
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from diptych.data.files import opened
from diptych.data.readers.faults import Fault
from diptych.errors import UserError

# A picture of 90 to 180 million pixels is read like any other, and `data check` notes it. Above that Pillow refuses.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

NARROW = 200  # times as long as wide: made as high as an encoder wants it, such a picture would fill the memory


@cache
def formats() -> list[str]:
    """Pillow's, but for EPS: to read it, Pillow runs Ghostscript on what may be anybody's program."""
    Image.init()
    return [name for name in Image.ID if name != "EPS"]


class BadPicture(UserError):
    """A picture that can't be used. `fault` says why, for whoever goes on without it."""

    def __init__(self, kind: str, path: str | Path, where: str, message: str):
        named = f"picture {str(path)!r} {message}"
        self.fault = Fault(kind, where, named)
        super().__init__(f"{where}: {named}" if where else named)


def open_picture(path: str | Path, where: str = "") -> Image.Image:
    """An RGB picture, turned as its EXIF says; of an animated one the first frame. where: of the row that names it."""
    return as_rgb(decode(path, where))


def decode(path: str | Path, where: str = "") -> Image.Image:
    """A picture's pixels as the file has them. Raises BadPicture where there are none, or not all."""
    try:
        with opened(path) as file:
            if not file.read(1):
                raise BadPicture("empty picture file", path, where, "is empty (0 bytes)")
            file.seek(0)
            with Image.open(file, formats=formats()) as picture:
                width, height = picture.size
                if max(width, height) > NARROW * min(width, height):
                    what = f"is {width} × {height}: one side is more than {NARROW} times the other"
                    raise BadPicture("picture too narrow", path, where, what)
                picture.load()
                return picture
    except BadPicture:
        raise
    except FileNotFoundError:
        raise BadPicture("missing picture", path, where, "is not there") from None
    except Image.DecompressionBombError as error:
        raise BadPicture("picture too large", path, where, f"is too large: {error}") from None
    except UnidentifiedImageError:
        raise BadPicture("not a picture", path, where, "is not a picture that Pillow knows") from None
    except PermissionError:
        raise BadPicture("picture not ours to read", path, where, "may not be read: permission denied") from None
    except MemoryError:
        raise
    except OSError as error:
        if error.errno not in (None, errno.EINVAL):  # the machine's, as too many open files; EINVAL is a seek too far
            raise UserError(
                f"{where + ': ' if where else ''}picture {str(path)!r} can't be read: {error.strerror}"
            ) from None
        raise _broken(error, path, where) from None
    except Exception as error:  # noqa: BLE001 - Pillow raises almost anything on a broken file: struct, zlib, syntax …
        raise _broken(error, path, where) from None


def _broken(error: Exception, path: str | Path, where: str) -> BadPicture:
    reason = " ".join(str(error).split()) or type(error).__name__
    kind = "truncated picture" if "truncated" in reason.lower() else "broken picture"
    return BadPicture(kind, path, where, f"does not decode: {reason}")


def as_rgb(picture: Image.Image) -> Image.Image:
    """In RGB and upright. Samples of 16 bits keep their upper 8, where Pillow would cut all above 255 to white."""
    with suppress(Exception):  # EXIF is a format of its own, and as often broken: the picture is then as it is
        picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I"):
        samples = np.asarray(picture)
        deep = picture.mode != "I" or samples.max(initial=0) > 255
        picture = Image.fromarray((samples // 257 if deep else samples).clip(0, 255).astype(np.uint8))
    return picture.convert("RGB")
