"""Which files are images: by suffix those that are looked at, by their first bytes those that are not decoded here."""

DECODED = (
    *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".pjpeg", ".pjp", ".mpo", ".webp", ".gif"),
    *(".bmp", ".dib", ".tif", ".tiff", ".avif", ".avifs"),
)
"""Suffixes of the formats that are decoded."""
NOT_DECODED = (
    *(
        ".heic",
        ".heif",
        ".hif",
        ".jxl",
        ".jp2",
        ".j2k",
        ".jpf",
        ".jpx",
        ".jxr",
        ".psd",
        ".psb",
        ".xcf",
        ".svg",
        ".svgz",
    ),
    *(".exr", ".hdr", ".tga", ".dds", ".ico", ".qoi", ".ppm", ".pgm", ".pnm", ".eps", ".dng", ".cr2", ".cr3", ".nef"),
    *(".arw", ".orf", ".raf", ".rw2"),
)
"""Suffixes of images that are not; they are read as well, so that they are counted and named."""
IMAGE_SUFFIXES = DECODED + NOT_DECODED

_HEADS = (
    (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"),
    (b"\xff\x0a", "JPEG XL"),
    (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000"),
    (b"\xff\x4f\xff\x51", "JPEG 2000"),
    (b"II\xbc", "JPEG XR"),
    (b"8BPS", "a Photoshop file"),
    (b"gimp xcf", "a GIMP file"),
    (b"v/1\x01", "OpenEXR"),
    (b"#?RADIANCE", "Radiance HDR"),
    (b"DDS ", "DDS"),
    (b"qoif", "QOI"),
    (b"\0\0\x01\0", "a Windows icon"),
    (b"%!PS", "PostScript"),
    (b"%PDF", "PDF"),
    (b"FUJIFILMCCD-RAW", "a camera's raw file"),
    (b"\x1aE\xdf\xa3", "a video"),
    *((b"P%d" % number, "PPM") for number in (1, 2, 3, 4, 5, 6)),
)
_BRANDS = {
    **dict.fromkeys(
        (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1"), "HEIC"
    ),
    b"crx ": "a camera's raw file",
    b"jxl ": "JPEG XL",
    **dict.fromkeys((b"avif", b"avis"), "AVIF"),
}


def undecoded(data: bytes) -> str:
    """Return the name of an image format that is not decoded here, by its first bytes; "" for anything else."""
    if data[4:8] == b"ftyp":
        return _BRANDS.get(data[8:12], "a video")
    if data[8:11] == b"CR\x02":
        return "a camera's raw file"
    return next((name for head, name in _HEADS if data.startswith(head)), "")
