/* safetensors: what is written is read back, what is damaged is refused with a reason. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "io/safetensors.h"
#include "src/rng.h"

static char folder[64], path[128];

static int make_folder(void **state)
{
    (void)state;
    snprintf(folder, sizeof folder, "/tmp/md_safetensors.XXXXXX");
    if (!mkdtemp(folder))
        return -1;
    snprintf(path, sizeof path, "%s/a.safetensors", folder);
    return 0;
}

static int drop_folder(void **state)
{
    (void)state;
    char cmd[128];
    snprintf(cmd, sizeof cmd, "rm -r %s", folder);
    return system(cmd);
}

static void put_bytes(const char *file, const void *data, size_t n)
{
    FILE *f = fopen(file, "wb");
    assert_non_null(f);
    assert_int_equal(fwrite(data, 1, n, f), n);
    fclose(f);
}

/* Writes length + header + `body` bytes that count up. */
static size_t put_file(const char *file, const char *header, size_t header_bytes, size_t body)
{
    static uint8_t buf[4096];
    uint64_t n = header_bytes;
    assert_true(8 + header_bytes + body <= sizeof buf);
    memcpy(buf, &n, 8);
    memcpy(buf + 8, header, header_bytes);
    for (size_t i = 0; i < body; i++)
        buf[8 + n + i] = (uint8_t)i;
    put_bytes(file, buf, 8 + header_bytes + body);
    return 8 + header_bytes + body;
}

static void refuse(const char *header, size_t body, md_status want, const char *word)
{
    md_safetensors *st;
    put_file(path, header, strlen(header), body);
    md_status got = md_safetensors_open(path, &st);
    if (got != want || !strstr(md_error_text(), word) || !strstr(md_error_text(), "a.safetensors"))
        fail_msg("header %s: status %d, text '%s', expected '%s'", header, got,
                 got ? md_error_text() : "", word);
    assert_null(st);
}

static void writes_and_reads_back(void **state)
{
    (void)state;
    float w[6] = {1, -2, 3.5f, 1e-40f, INFINITY, 0};
    int64_t big[2] = {INT64_MIN, INT64_MAX};
    int32_t i32[1] = {-7};
    uint8_t u8[3] = {0, 128, 255};
    md_st_tensor list[] = {
        {"u8", MD_TENSOR(u8, MD_U8, 3)},    {"w", MD_TENSOR(w, MD_F32, 2, 3)},
        {"big", MD_TENSOR(big, MD_I64, 2)}, {"none", MD_TENSOR(w, MD_F32, 0, 5)},
        {"one", MD_TENSOR(i32, MD_I32, 1)}, {"scalar", md_tensor_make(w, MD_F32, 0, NULL)},
    };
    md_st_meta meta[] = {{"format", "pt"}, {"who", "t\xc3\xa4st \"quoted\""}};
    assert_int_equal(md_safetensors_write(path, list, 6, meta, 2), MD_OK);

    md_safetensors *st;
    assert_int_equal(md_safetensors_open(path, &st), MD_OK);
    assert_int_equal(md_safetensors_count(st), 6);
    assert_string_equal(md_safetensors_metadata(st, "who"), "t\xc3\xa4st \"quoted\"");
    assert_null(md_safetensors_metadata(st, "absent"));
    assert_int_equal(md_safetensors_find(st, "absent"), -1);
    for (int i = 1; i < 6; i++)
        assert_true(strcmp(md_safetensors_at(st, i - 1)->name, md_safetensors_at(st, i)->name) < 0);
    for (size_t k = 0; k < MD_COUNT(list); k++) {
        md_tensor t;
        assert_int_equal(md_safetensors_load(st, list[k].name, (md_dtype)list[k].t.dtype, &t),
                         MD_OK);
        assert_true(md_tensor_same_shape(&t, &list[k].t));
        assert_memory_equal(t.data, list[k].t.data, md_tensor_bytes(&t));
        md_free(t.data);
        const md_st_entry *e = md_safetensors_at(st, md_safetensors_find(st, list[k].name));
        assert_int_equal(e->begin % (int64_t)md_dtype_bytes((md_dtype)list[k].t.dtype), 0);
    }
    md_tensor t;
    assert_int_equal(md_safetensors_load(st, "big", MD_I32, &t), MD_ERR_DATA);
    assert_int_equal(md_safetensors_load(st, "big", MD_F32, &t), MD_ERR_DATA);
    assert_int_equal(md_safetensors_load(st, "absent", MD_F32, &t), MD_ERR_DATA);
    md_safetensors_close(st);
}

/* The bytes the published package (0.8.0) writes for the same tensors. */
static void writes_what_the_published_writer_writes(void **state)
{
    (void)state;
    static const char want[] =
        "\x88\0\0\0\0\0\0\0"
        "{\"__metadata__\":{\"k\":\"v\"},\"b\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":["
        "0,"
        "8]},\"a\":{\"dtype\":\"U8\",\"shape\":[3],\"data_offsets\":[8,11]}}    "
        "\0\0\0\0\0\0\0\0\0\0";
    uint8_t a[3] = {0};
    float b[2] = {0};
    char got[sizeof want + 1];
    md_st_tensor list[] = {{"a", MD_TENSOR(a, MD_U8, 3)}, {"b", MD_TENSOR(b, MD_F32, 2)}};
    md_st_meta meta = {"k", "v"};
    assert_int_equal(md_safetensors_write(path, list, 2, &meta, 1), MD_OK);
    FILE *f = fopen(path, "rb");
    assert_non_null(f);
    assert_int_equal(fread(got, 1, sizeof got, f), sizeof want);
    fclose(f);
    assert_memory_equal(got, want, sizeof want);
}

static void writer_fails_cleanly(void **state)
{
    (void)state;
    char far[160];
    float w[1] = {0};
    md_st_tensor twice[] = {{"w", MD_TENSOR(w, MD_F32, 1)}, {"w", MD_TENSOR(w, MD_F32, 1)}};
    assert_int_equal(md_safetensors_write(path, twice, 2, NULL, 0), MD_ERR_BUG);
    snprintf(far, sizeof far, "%s/none/b.safetensors", folder);
    assert_int_equal(md_safetensors_write(far, twice, 1, NULL, 0), MD_ERR_CREATE);
    assert_int_equal(md_safetensors_write("/dev/full/x", twice, 1, NULL, 0), MD_ERR_CREATE);
}

#define T(body)  "{\"x\":{\"dtype\":\"F32\"," body "}}"
#define OK_SHAPE "\"shape\":[2],\"data_offsets\":[0,8]"

/* What is wrong and a word of the message that says so. */
static const struct {
    const char *header;
    size_t body;
    const char *word;
} bad_headers[] = {
    {"", 0, "not a safetensors file"},
    {"[]", 0, "'{'"},
    {" {}", 0, "'{'"},
    {"{}\n", 0, "'}'"},
    {"{}}", 0, "not valid"},
    {"{} {}", 0, "not valid"},
    {"{}", 1, "follow the last tensor"},
    {T(OK_SHAPE), 7, "outside the file"},
    {T(OK_SHAPE), 9, "follow the last tensor"},
    {T("\"shape\":[3],\"data_offsets\":[0,8]"), 8, "do not take 8 bytes"},
    {T("\"shape\":[2],\"data_offsets\":[8,0]"), 8, "outside"},
    {T("\"shape\":[2],\"data_offsets\":[4,12]"), 12, "a gap"},
    {T("\"shape\":[2],\"data_offsets\":[0]"), 8, "two numbers"},
    {T("\"shape\":[2],\"data_offsets\":[0,8,9]"), 8, "two numbers"},
    {T("\"shape\":[2.0],\"data_offsets\":[0,8]"), 8, "not allowed there"},
    {T("\"shape\":[2e0],\"data_offsets\":[0,8]"), 8, "not allowed there"},
    {T("\"shape\":[-2],\"data_offsets\":[0,8]"), 8, "not allowed there"},
    {T("\"shape\":[18446744073709551618],\"data_offsets\":[0,8]"), 8, "not valid"},
    {T("\"shape\":[4294967296,4294967296],\"data_offsets\":[0,8]"), 8, "overflows"},
    {T("\"shape\":[4611686018427387904],\"data_offsets\":[0,8]"), 8, "do not take"},
    {T("\"shape\":2,\"data_offsets\":[0,8]"), 8, "shape"},
    {T("\"shape\":[\"2\"],\"data_offsets\":[0,8]"), 8, "shape"},
    {T("\"shape\":[1,1,1,1,1,1,1,1,2],\"data_offsets\":[0,8]"), 8, "at most 8"},
    {T("\"shape\":[2]"), 8, "fields"},
    {T(OK_SHAPE ",\"extra\":1"), 8, "fields"},
    {T(OK_SHAPE ",\"shape\":[2]"), 8, "duplicate"},
    {"{\"x\":{\"dtype\":\"F33\"," OK_SHAPE "}}", 8, "dtype 'F33'"},
    {"{\"x\":{\"dtype\":3," OK_SHAPE "}}", 8, "dtype"},
    {"{\"x\":[]}", 0, "fields"},
    {"{\"a\\u0001b\":{\"dtype\":\"F32\"," OK_SHAPE "}}", 8, "control byte"},
    {"{\"a\\u0000b\":{\"dtype\":\"F32\"," OK_SHAPE "}}", 8, "not valid"},
    {"{\"a\xff\":{\"dtype\":\"F32\"," OK_SHAPE "}}", 8, "not valid"},
    {"{\"x\":{\"dtype\":\"F32\"," OK_SHAPE "},\"x\":{\"dtype\":\"F32\"," OK_SHAPE "}}", 8,
     "duplicate"},
    {"{\"x\":{\"dtype\":\"F32\"," OK_SHAPE "},\"y\":{\"dtype\":\"F32\",\"shape\":[2],"
     "\"data_offsets\":[4,12]}}",
     12, "an overlap"},
    {"{\"x\":{\"dtype\":\"F4\",\"shape\":[3],\"data_offsets\":[0,2]}}", 2, "do not take"},
    {"{\"__metadata__\":{\"a\":1}}", 0, "not a string"},
    {"{\"__metadata__\":[]}", 0, "not an object"},
};

static void refuses_bad_headers(void **state)
{
    (void)state;
    for (size_t i = 0; i < MD_COUNT(bad_headers); i++)
        refuse(bad_headers[i].header, bad_headers[i].body, MD_ERR_DATA, bad_headers[i].word);

    md_safetensors *st;
    put_file(path, T(OK_SHAPE) "   ", strlen(T(OK_SHAPE) "   "),
             8); /* the pattern itself is fine */
    assert_int_equal(md_safetensors_open(path, &st), MD_OK);
    md_safetensors_close(st);
    put_bytes(path, "\xff\xff\xff\xff\xff\xff\xff\xff{}", 10);
    assert_int_equal(md_safetensors_open(path, &st), MD_ERR_DATA);
    put_bytes(path, "\2\0\0", 3);
    assert_int_equal(md_safetensors_open(path, &st), MD_ERR_DATA);
    assert_int_equal(md_safetensors_open("/nowhere/x.safetensors", &st), MD_ERR_NOINPUT);
    assert_non_null(strstr(md_error_text(), "/nowhere/x.safetensors"));
    assert_int_equal(md_safetensors_open("/dev/null", &st), MD_ERR_DATA);
    assert_int_equal(md_safetensors_open(folder, &st), MD_ERR_NOINPUT);
}

static void refuses_a_long_name(void **state)
{
    (void)state;
    char header[1024], name[MD_ST_MAX_NAME + 2];
    memset(name, 'n', sizeof name);
    for (int extra = 0; extra < 2; extra++) {
        snprintf(header, sizeof header, "{\"%.*s\":{\"dtype\":\"F32\"," OK_SHAPE "}}",
                 MD_ST_MAX_NAME + extra, name);
        md_safetensors *st;
        put_file(path, header, strlen(header), 8);
        assert_int_equal(md_safetensors_open(path, &st), extra ? MD_ERR_DATA : MD_OK);
        md_safetensors_close(st);
    }
}

/* Every half against its definition, and the other widths against hand-made values. */
static void converts_exactly(void **state)
{
    (void)state;
    static uint16_t half[65536];
    static float got[65536];
    uint16_t bf[3] = {0x3f80, 0xc049, 0x0001};
    double wide[3] = {0.1, -3, 1e-300};
    for (int i = 0; i < 65536; i++)
        half[i] = (uint16_t)i;
    md_st_tensor list[] = {{"h", MD_TENSOR(half, MD_F16, 65536)},
                           {"b", MD_TENSOR(bf, MD_BF16, 3)},
                           {"d", MD_TENSOR(wide, MD_F64, 3)}};
    assert_int_equal(md_safetensors_write(path, list, 3, NULL, 0), MD_OK);
    md_safetensors *st;
    assert_int_equal(md_safetensors_open(path, &st), MD_OK);
    assert_int_equal(md_safetensors_read_f32(st, md_safetensors_find(st, "h"), got), MD_OK);
    for (int i = 0; i < 65536; i++) {
        int exp = (i >> 10) & 31, frac = i & 1023;
        double v = exp ? ldexp(1024 + frac, exp - 25) : ldexp(frac, -24);
        if (exp == 31)
            v = frac ? NAN : INFINITY;
        if (i & 0x8000)
            v = -v;
        bool same =
            isnan(v) ? isnan(got[i]) : (double)got[i] == v && !signbit(got[i]) == !signbit(v);
        if (!same)
            fail_msg("half 0x%04x became %g, not %g", (unsigned)i, (double)got[i], v);
    }
    assert_int_equal(md_safetensors_read_f32(st, md_safetensors_find(st, "b"), got), MD_OK);
    assert_true(got[0] == 1.0f && got[1] == -3.140625f && got[2] == 0x1p-133f);
    assert_int_equal(md_safetensors_read_f32(st, md_safetensors_find(st, "d"), got), MD_OK);
    assert_true(got[0] == 0.1f && got[1] == -3.0f && got[2] == 0.0f);
    md_safetensors_close(st);
}

static void put_index(const char *map)
{
    char file[160], text[512];
    snprintf(file, sizeof file, "%s/model.safetensors.index.json", folder);
    snprintf(text, sizeof text, "{\"metadata\":{\"total_size\":12},\"weight_map\":%s}", map);
    put_bytes(file, text, strlen(text));
}

static void reads_sharded_sets(void **state)
{
    (void)state;
    char one[160], two[160];
    float a[2] = {1, 2}, b[1] = {3};
    md_st_tensor first = {"a", MD_TENSOR(a, MD_F32, 2)}, second = {"b", MD_TENSOR(b, MD_F32, 1)};
    snprintf(one, sizeof one, "%s/m-1.safetensors", folder);
    snprintf(two, sizeof two, "%s/m-2.safetensors", folder);
    assert_int_equal(md_safetensors_write(one, &first, 1, NULL, 0), MD_OK);
    assert_int_equal(md_safetensors_write(two, &second, 1, NULL, 0), MD_OK);

    md_safetensors *st;
    put_index("{\"a\":\"m-1.safetensors\",\"b\":\"m-2.safetensors\"}");
    assert_int_equal(md_safetensors_open(folder, &st), MD_OK);
    assert_int_equal(md_safetensors_count(st), 2);
    float x[2] = {0};
    assert_int_equal(md_safetensors_read_f32(st, md_safetensors_find(st, "b"), x), MD_OK);
    assert_true(x[0] == 3);
    assert_string_equal(md_safetensors_file(st, 1), two);
    md_safetensors_close(st);

    static const struct {
        const char *map, *word;
        md_status status;
    } bad[] = {
        {"{\"a\":\"m-1.safetensors\"}", "", MD_OK},
        {"{\"a\":\"m-1.safetensors\",\"b\":\"m-1.safetensors\"}", "'b' is not in", MD_ERR_DATA},
        {"{\"a\":\"m-2.safetensors\",\"b\":\"m-1.safetensors\"}", "but the index says",
         MD_ERR_DATA},
        {"{\"b\":\"m-2.safetensors\",\"c\":\"m-1.safetensors\"}", "but the index says",
         MD_ERR_DATA},
        {"{\"a\":\"../m-1.safetensors\"}", "not a file name", MD_ERR_DATA},
        {"{\"a\":1}", "not a file name", MD_ERR_DATA},
        {"{\"a\":\"m-3.safetensors\"}", "m-3.safetensors", MD_ERR_NOINPUT},
        {"{}", "no weight_map", MD_ERR_DATA},
        {"3", "no weight_map", MD_ERR_DATA},
        {"{", "not valid", MD_ERR_DATA},
    };
    for (size_t i = 0; i < MD_COUNT(bad); i++) {
        put_index(bad[i].map);
        md_status got = md_safetensors_open(folder, &st);
        if (got != bad[i].status || (got && !strstr(md_error_text(), bad[i].word)))
            fail_msg("%s: status %d, '%s'", bad[i].map, got, got ? md_error_text() : "");
        md_safetensors_close(st);
    }
}

static void survives_a_file_cut_while_open(void **state)
{
    (void)state;
    float w[4] = {0};
    md_st_tensor t = {"w", MD_TENSOR(w, MD_F32, 4)};
    assert_int_equal(md_safetensors_write(path, &t, 1, NULL, 0), MD_OK);
    md_safetensors *st;
    assert_int_equal(md_safetensors_open(path, &st), MD_OK);
    assert_int_equal(truncate(path, 70), 0);
    assert_int_equal(md_safetensors_read_f32(st, 0, w), MD_ERR_DATA);
    assert_non_null(strstr(md_error_text(), "'w'"));
    md_safetensors_close(st);
}

/* Mutates a good file: flips, swaps, deletes, doubles bytes. Whatever opens must read in bounds. */
static void survives_mutations(void **state)
{
    (void)state;
    static const char good[] =
        "{\"__metadata__\":{\"format\":\"pt\"},\"a.b\":{\"dtype\":\"F32\",\"shape\":[2,3],"
        "\"data_offsets\":[0,24]},\"c\":{\"dtype\":\"F16\",\"shape\":[4],\"data_offsets\":[24,32]},"
        "\"i\":{\"dtype\":\"I64\",\"shape\":[],\"data_offsets\":[32,40]}}  ";
    static const char spice[] = "{}[]:,\"0123456789 \\eE.-xF\x01\xff";
    static uint8_t base[512], buf[600], out[8192];
    size_t size = put_file(path, good, sizeof good - 1, 40);
    FILE *f = fopen(path, "rb");
    assert_non_null(f);
    assert_int_equal(fread(base, 1, size, f), size);
    fclose(f);
    int opened = 0;
    for (uint32_t trial = 0; trial < 20000; trial++) {
        uint32_t r[4];
        md_rng_key key = {.seed = 7, .stream = MD_RNG_TEST, .index = trial};
        size_t n = size;
        memcpy(buf, base, size);
        md_rng_bits(key, 0, r);
        uint32_t edits = 1 + r[0] % 3;
        for (uint32_t k = 1; k <= edits; k++) {
            md_rng_bits(key, k, r);
            size_t at = r[1] % n;
            if (r[2] % 4 == 0)
                buf[at] = (uint8_t)r[3];
            else if (r[2] % 4 == 1)
                buf[at] = (uint8_t)spice[r[3] % (sizeof spice - 1)];
            else if (r[2] % 4 == 2)
                memmove(buf + at, buf + at + 1, --n - at);
            else
                memmove(buf + at + 1, buf + at, n++ - at);
        }
        unlink(path); /* a new file is cheaper than a shortened one on some file systems */
        put_bytes(path, buf, n);
        md_safetensors *st;
        if (md_safetensors_open(path, &st) != MD_OK)
            continue;
        opened++;
        for (int i = 0; i < md_safetensors_count(st); i++) {
            assert_true(md_safetensors_at(st, i)->bytes <= (int64_t)n);
            assert_int_equal(md_safetensors_read(st, i, out), MD_OK);
        }
        md_safetensors_close(st);
    }
    assert_true(opened > 100 && opened < 19000);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(writes_and_reads_back),
        cmocka_unit_test(writes_what_the_published_writer_writes),
        cmocka_unit_test(writer_fails_cleanly),
        cmocka_unit_test(refuses_bad_headers),
        cmocka_unit_test(refuses_a_long_name),
        cmocka_unit_test(converts_exactly),
        cmocka_unit_test(reads_sharded_sets),
        cmocka_unit_test(survives_a_file_cut_while_open),
        cmocka_unit_test(survives_mutations),
    };
    return cmocka_run_group_tests_name("safetensors", tests, make_folder, drop_folder);
}
