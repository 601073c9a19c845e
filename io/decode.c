/* decode: see decode.h. libjpeg and libpng report errors by a callback that must not return; both
 * leave through longjmp to the one setjmp of their function here, with the reason already in the
 * decoder. Nothing that changes after setjmp lives in a local variable. */
#include "io/decode.h"

#include <setjmp.h>
#include <stdio.h>
#include <string.h>

#include <jpeglib.h>
#include <jerror.h>
#include <png.h>

#define ROWS_A_CALL 8
#define KEEP_PIXELS ((int64_t)4 << 20) /* 16 MiB */

struct md_decoder {
    struct jpeg_decompress_struct jpeg;
    struct jpeg_error_mgr jpeg_errors;
    struct jpeg_progress_mgr jpeg_progress;
    jmp_buf leave;
    char reason[JMSG_LENGTH_MAX];
    uint8_t *pixels;
    size_t start, capacity; /* bytes of pixels at creation and now */
    bool jpeg_ready;
    /* the PNG being read */
    png_structp png;
    png_infop png_info;
    const uint8_t *png_next;
    size_t png_left;
    png_bytep *png_rows;
    size_t png_rows_capacity;
};

/* ---- common ---- */

static size_t buffer_bytes(int64_t pixels)
{
    return (size_t)pixels * 4;
}

/* Room for w x h pixels. What a huge picture needed is given back at the next ordinary one. */
static md_status make_room(md_decoder *d, int w, int h)
{
    size_t need = buffer_bytes((int64_t)w * h), keep = MD_MAX(d->start, buffer_bytes(KEEP_PIXELS));
    if (need <= d->capacity && (need > keep || d->capacity <= keep))
        return MD_OK;
    md_free(d->pixels);
    d->capacity = 0;
    need = MD_MAX(need, d->start);
    d->pixels = md_alloc(need, "decode");
    if (!d->pixels)
        return MD_ERR_MEMORY;
    d->capacity = need;
    return MD_OK;
}

/* Limits, and the size `want` says if it says one. */
static md_status check_size(int64_t w, int64_t h, const md_coded *want)
{
    if (w < 1 || h < 1 || w > MD_IMAGE_MAX_SIDE || h > MD_IMAGE_MAX_SIDE ||
        w * h > MD_IMAGE_MAX_PIXELS)
        MD_FAIL(MD_ERR_DATA, "picture of %lld x %lld pixels is outside the limit of %lld pixels",
                (long long)w, (long long)h, (long long)MD_IMAGE_MAX_PIXELS);
    if (want && ((want->w && w != want->w) || (want->h && h != want->h)))
        MD_FAIL(MD_ERR_DATA, "picture is %lld x %lld pixels where %d x %d were expected",
                (long long)w, (long long)h, want->w, want->h);
    return MD_OK;
}

static bool is_jpeg(const uint8_t *bytes, size_t n)
{
    return n >= 3 && bytes[0] == 0xff && bytes[1] == 0xd8 && bytes[2] == 0xff;
}

static bool is_png(const uint8_t *bytes, size_t n)
{
    return n >= 8 && png_sig_cmp(bytes, 0, 8) == 0;
}

/* ---- JPEG ---- */

_Noreturn static void jpeg_fatal(j_common_ptr j)
{
    md_decoder *d = j->client_data;
    j->err->format_message(j, d->reason);
    longjmp(d->leave, 1);
}

/* Level -1 is a warning: libjpeg would go on with invented data, so all but the two about odd
 * version numbers are errors. Levels 0.. are traces. */
static void jpeg_message(j_common_ptr j, int level)
{
    if (level < 0 && j->err->msg_code != JWRN_JFIF_MAJOR && j->err->msg_code != JWRN_ADOBE_XFORM)
        jpeg_fatal(j);
}

/* libjpeg calls this between passes and rows; a file of many empty scans costs time without end. */
static void jpeg_watch_scans(j_common_ptr j)
{
    md_decoder *d = j->client_data;
    if (d->jpeg.input_scan_number > MD_IMAGE_MAX_SCANS) {
        snprintf(d->reason, sizeof d->reason, "more than %d scans", MD_IMAGE_MAX_SCANS);
        longjmp(d->leave, 1);
    }
}

static md_status jpeg_reason(md_decoder *d)
{
    jpeg_abort_decompress(&d->jpeg);
    MD_FAIL(MD_ERR_DATA, "JPEG: %s", d->reason);
}

static md_status jpeg_header(md_decoder *d, const uint8_t *bytes, size_t n)
{
    if (setjmp(d->leave))
        return jpeg_reason(d);
    if (!d->jpeg_ready) {
        d->jpeg.err = jpeg_std_error(&d->jpeg_errors);
        d->jpeg_errors.error_exit = jpeg_fatal;
        d->jpeg_errors.emit_message = jpeg_message;
        d->jpeg.client_data = d;
        jpeg_create_decompress(&d->jpeg);
        d->jpeg_progress.progress_monitor = jpeg_watch_scans;
        d->jpeg.progress = &d->jpeg_progress;
        d->jpeg_ready = true;
    }
    jpeg_mem_src(&d->jpeg, bytes, (unsigned long)n);
    jpeg_read_header(&d->jpeg, TRUE);
    return MD_OK;
}

/* One row of libjpeg's output, packed at the row's start, -> 4 bytes a pixel, in place from the
 * end. CMYK: Adobe stores inks inverted, and like Pillow we take every CMYK file as Adobe's: R = K
 * - (255 - C) * K / 255, rounded, with the file's C and K. */
static void jpeg_widen_row(uint8_t *row, int w, int components)
{
    for (int x = w - 1; x >= 0; x--) {
        const uint8_t *in = row + (size_t)x * (size_t)components;
        uint8_t *out = row + (size_t)x * 4;
        uint8_t c[4] = {in[0], in[components == 1 ? 0 : 1], in[components == 1 ? 0 : 2], 255};
        if (components == 4) {
            int k = in[3];
            for (int i = 0; i < 3; i++) {
                int t = (255 - c[i]) * k + 128;
                c[i] = (uint8_t)(k - (((t >> 8) + t) >> 8));
            }
        }
        memcpy(out, c, 4);
    }
}

static md_status jpeg_rows(md_decoder *d)
{
    struct jpeg_decompress_struct *j = &d->jpeg;
    if (setjmp(d->leave))
        return jpeg_reason(d);
    bool wide = false; /* libjpeg itself writes 4 bytes a pixel */
    if (j->num_components == 4) {
        j->out_color_space = JCS_CMYK;
    } else if (j->num_components == 3 || j->num_components == 1) {
#ifdef JCS_EXTENSIONS
        j->out_color_space = JCS_EXT_RGBX;
        wide = true;
#else
        j->out_color_space = j->num_components == 3 ? JCS_RGB : JCS_GRAYSCALE;
#endif
    } else {
        snprintf(d->reason, sizeof d->reason, "%d colour components", j->num_components);
        return jpeg_reason(d);
    }
    jpeg_start_decompress(j);
    size_t stride = (size_t)j->output_width * 4;
    while (j->output_scanline < j->output_height) {
        JDIMENSION y = j->output_scanline;
        JSAMPROW rows[ROWS_A_CALL];
        JDIMENSION want = MD_MIN((JDIMENSION)ROWS_A_CALL, j->output_height - y);
        for (JDIMENSION i = 0; i < want; i++)
            rows[i] = d->pixels + (size_t)(y + i) * stride;
        JDIMENSION got = jpeg_read_scanlines(j, rows, want);
        for (JDIMENSION i = 0; i < got && !wide; i++)
            jpeg_widen_row(rows[i], (int)j->output_width, j->output_components);
    }
    jpeg_abort_decompress(j); /* what follows the last row is nobody's business */
    return MD_OK;
}

static md_status decode_jpeg(md_decoder *d, const md_coded *in, md_image *out)
{
    MD_TRY(jpeg_header(d, in->bytes, in->n));
    int w = (int)d->jpeg.image_width, h = (int)d->jpeg.image_height;
    md_status st = check_size(w, h, in);
    if (st == MD_OK)
        st = make_room(d, w, h);
    if (st != MD_OK) {
        jpeg_abort_decompress(&d->jpeg);
        return st;
    }
    MD_TRY(jpeg_rows(d));
    *out = (md_image){d->pixels, w, h};
    return MD_OK;
}

/* ---- PNG ---- */

_Noreturn static void png_fatal(png_structp png, png_const_charp text)
{
    md_decoder *d = png_get_error_ptr(png);
    snprintf(d->reason, sizeof d->reason, "%s", text);
    longjmp(d->leave, 1);
}

/* libpng's warnings are about ancillary chunks (profiles, times); pixels are guarded by checksums.
 */
static void png_note(png_structp png, png_const_charp text)
{
    (void)png;
    (void)text;
}

static void png_read_bytes(png_structp png, png_bytep to, size_t n)
{
    md_decoder *d = png_get_io_ptr(png);
    if (n > d->png_left)
        png_error(png, "file ends early");
    memcpy(to, d->png_next, n);
    d->png_next += n;
    d->png_left -= n;
}

/* Pillow keeps 16-bit grey as integers and clips them when it converts to RGB. */
static void png_clip_gray16(uint8_t *row, int w)
{
    for (int x = w - 1; x >= 0; x--) {
        uint8_t v = row[2 * (size_t)x] ? 255 : row[2 * (size_t)x + 1];
        memcpy(row + 4 * (size_t)x, (uint8_t[4]){v, v, v, 255}, 4);
    }
}

/* Width and height of a PNG's first chunk; libpng checks the chunk itself when it reads it. */
static md_status png_size(const uint8_t *b, size_t n, int64_t *w, int64_t *h)
{
    if (n < 24 || memcmp(b + 12, "IHDR", 4) != 0)
        MD_FAIL(MD_ERR_DATA, "PNG: no header chunk");
    *w = (int64_t)b[16] << 24 | b[17] << 16 | b[18] << 8 | b[19];
    *h = (int64_t)b[20] << 24 | b[21] << 16 | b[22] << 8 | b[23];
    return MD_OK;
}

static void png_rows(md_decoder *d, int w, int h)
{
    png_structp png = d->png;
    png_set_crc_action(png, PNG_CRC_ERROR_QUIT, PNG_CRC_QUIET_USE);
    png_set_user_limits(png, (png_uint_32)w, (png_uint_32)h);
    png_read_info(png, d->png_info);
    int colour = png_get_color_type(png, d->png_info), depth = png_get_bit_depth(png, d->png_info);
    bool gray16 = colour == PNG_COLOR_TYPE_GRAY && depth == 16;
    if (!gray16) {
        if (colour == PNG_COLOR_TYPE_PALETTE)
            png_set_palette_to_rgb(png);
        if (colour == PNG_COLOR_TYPE_GRAY && depth < 8)
            png_set_expand_gray_1_2_4_to_8(png);
        png_set_strip_16(png);
        if (!(colour & PNG_COLOR_MASK_COLOR))
            png_set_gray_to_rgb(png);
        png_set_add_alpha(png, 255, PNG_FILLER_AFTER);
    }
    png_set_interlace_handling(png);
    png_read_update_info(png, d->png_info);
    if (png_get_rowbytes(png, d->png_info) != (size_t)w * (gray16 ? 2 : 4))
        png_error(png, "unsupported pixel layout");
    for (int y = 0; y < h; y++)
        d->png_rows[y] = d->pixels + (size_t)y * (size_t)w * 4;
    png_read_image(png, d->png_rows);
    for (int y = 0; y < h && gray16; y++)
        png_clip_gray16(d->png_rows[y], w);
    png_read_end(png, NULL);
}

/* False with the reason set when libpng left by png_fatal. */
static bool png_run(md_decoder *d, int w, int h)
{
    if (setjmp(d->leave))
        return false;
    png_set_read_fn(d->png, d, png_read_bytes);
    png_rows(d, w, h);
    return true;
}

static md_status decode_png(md_decoder *d, const md_coded *in, md_image *out)
{
    int64_t w = 0, h = 0;
    MD_TRY(png_size(in->bytes, in->n, &w, &h));
    MD_TRY(check_size(w, h, in));
    MD_TRY(make_room(d, (int)w, (int)h));
    if ((size_t)h > d->png_rows_capacity) {
        md_free(d->png_rows);
        d->png_rows_capacity = 0;
        MD_NEW(d->png_rows, h, "decode");
        d->png_rows_capacity = (size_t)h;
    }
    d->png_next = in->bytes;
    d->png_left = in->n;
    snprintf(d->reason, sizeof d->reason, "out of memory");
    d->png = png_create_read_struct(PNG_LIBPNG_VER_STRING, d, png_fatal, png_note);
    d->png_info = d->png ? png_create_info_struct(d->png) : NULL;
    bool good = d->png_info && png_run(d, (int)w, (int)h);
    png_destroy_read_struct(&d->png, &d->png_info, NULL);
    if (!good)
        MD_FAIL(MD_ERR_DATA, "PNG: %s", d->reason);
    *out = (md_image){d->pixels, (int)w, (int)h};
    return MD_OK;
}

/* ---- raw ---- */

static md_status decode_raw(md_decoder *d, const md_coded *in, md_image *out)
{
    MD_TRY(check_size(in->w, in->h, NULL));
    size_t pixels = (size_t)in->w * (size_t)in->h, components = in->kind == MD_IMAGE_RGB8 ? 3 : 1;
    if (in->n != pixels * components)
        MD_FAIL(MD_ERR_DATA, "raw picture of %d x %d x %zu has %zu bytes", in->w, in->h, components,
                in->n);
    MD_TRY(make_room(d, in->w, in->h));
    for (size_t i = 0; i < pixels; i++) {
        const uint8_t *p = in->bytes + i * components;
        uint8_t c[4] = {p[0], p[components / 2], p[components - 1], 255};
        memcpy(d->pixels + 4 * i, c, 4);
    }
    *out = (md_image){d->pixels, in->w, in->h};
    return MD_OK;
}

/* ---- public ---- */

size_t md_decoder_bytes(int64_t max_pixels)
{
    return sizeof(md_decoder) + buffer_bytes(max_pixels);
}

md_status md_decoder_create(md_decoder **out, int64_t max_pixels)
{
    *out = NULL;
    md_decoder *d = md_alloc(sizeof *d, "decode");
    if (!d)
        return MD_ERR_MEMORY;
    d->start = d->capacity = buffer_bytes(MD_MIN(max_pixels, MD_IMAGE_MAX_PIXELS));
    d->pixels = md_alloc(d->capacity, "decode");
    if (!d->pixels) {
        md_free(d);
        return MD_ERR_MEMORY;
    }
    *out = d;
    return MD_OK;
}

void md_decoder_free(md_decoder *d)
{
    if (!d)
        return;
    if (d->jpeg_ready)
        jpeg_destroy_decompress(&d->jpeg);
    md_free(d->png_rows);
    md_free(d->pixels);
    md_free(d);
}

md_status md_decode_probe(md_decoder *d, const uint8_t *bytes, size_t n, md_image_kind *kind,
                          int *w, int *h)
{
    int64_t got_w = 0, got_h = 0;
    if (is_jpeg(bytes, n)) {
        MD_TRY(jpeg_header(d, bytes, n));
        *kind = MD_IMAGE_JPEG;
        got_w = d->jpeg.image_width;
        got_h = d->jpeg.image_height;
        jpeg_abort_decompress(&d->jpeg);
    } else if (is_png(bytes, n)) {
        *kind = MD_IMAGE_PNG;
        MD_TRY(png_size(bytes, n, &got_w, &got_h));
    } else {
        MD_FAIL(MD_ERR_DATA, "neither JPEG nor PNG (%zu bytes)", n);
    }
    MD_TRY(check_size(got_w, got_h, NULL));
    *w = (int)got_w;
    *h = (int)got_h;
    return MD_OK;
}

md_status md_decode_image(md_decoder *d, const md_coded *in, md_image *out)
{
    if (in->kind == MD_IMAGE_RGB8 || in->kind == MD_IMAGE_GRAY8)
        return decode_raw(d, in, out);
    if (is_jpeg(in->bytes, in->n))
        return decode_jpeg(d, in, out);
    if (is_png(in->bytes, in->n))
        return decode_png(d, in, out);
    MD_FAIL(MD_ERR_DATA, "neither JPEG nor PNG (%zu bytes)", in->n);
}
