/* backend_memory: memory, transfers, recordings and choices of a backend, or of the host. */
#include "kernels/backend.h"

#include <string.h>

static md_status host_copy(void *dst, const void *src, size_t bytes)
{
    if (bytes > 0 && dst != src)
        memcpy(dst, src, bytes);
    return MD_OK;
}

static md_status host_alloc(size_t bytes, const char *what, void **out)
{
    *out = md_alloc(bytes, what);
    return *out ? MD_OK : MD_ERR_MEMORY;
}

md_status md_backend_alloc(md_backend *be, size_t bytes, const char *what, void **out)
{
    if (!be->memory)
        return host_alloc(bytes, what, out);
    md_status st = be->memory->alloc(be, bytes, out);
    return st == MD_OK ? st : md_error_prefix(st, "%s", what);
}

void md_backend_free(md_backend *be, void *p)
{
    if (p && be->memory)
        be->memory->free(be, p);
    else
        md_free(p);
}

md_status md_backend_pinned(md_backend *be, size_t bytes, const char *what, void **out)
{
    if (!be->memory)
        return host_alloc(bytes, what, out);
    md_status st = be->memory->pinned(be, bytes, out);
    return st == MD_OK ? st : md_error_prefix(st, "%s", what);
}

void md_backend_pinned_free(md_backend *be, void *p)
{
    if (p && be->memory)
        be->memory->pinned_free(be, p);
    else
        md_free(p);
}

md_status md_backend_upload(md_backend *be, void *dst, const void *src, size_t bytes)
{
    return be->memory ? be->memory->upload(be, dst, src, bytes) : host_copy(dst, src, bytes);
}

md_status md_backend_download(md_backend *be, void *dst, const void *src, size_t bytes)
{
    return be->memory ? be->memory->download(be, dst, src, bytes) : host_copy(dst, src, bytes);
}

md_status md_backend_sync(md_backend *be)
{
    return be->memory ? be->memory->sync(be) : MD_OK;
}

md_status md_backend_feed_wait(md_backend *be, int slot)
{
    return be->memory ? be->memory->feed_wait(be, slot) : MD_OK;
}

md_status md_backend_feed(md_backend *be, int slot, void *dst, const void *src, size_t bytes)
{
    return be->memory ? be->memory->feed(be, slot, dst, src, bytes) : host_copy(dst, src, bytes);
}

md_status md_backend_feed_used(md_backend *be, int slot)
{
    return be->memory ? be->memory->feed_used(be, slot) : MD_OK;
}

md_status md_backend_record_begin(md_backend *be)
{
    MD_ASSERT(md_backend_can_record(be));
    return be->memory->record_begin(be);
}

md_status md_backend_record_end(md_backend *be, md_recording **out)
{
    return be->memory->record_end(be, out);
}

md_status md_backend_replay(md_backend *be, md_recording *r)
{
    return be->memory->replay(be, r);
}

void md_backend_record_free(md_backend *be, md_recording *r)
{
    if (r)
        be->memory->record_free(be, r);
}

void md_backend_tune(md_backend *be)
{
    if (be->tuning)
        be->tuning->on(be);
}

md_status md_backend_choices_write(md_backend *be, char **out)
{
    if (be->tuning)
        return be->tuning->write(be, out);
    *out = md_alloc(1, "choices");
    return *out ? MD_OK : MD_ERR_MEMORY;
}

md_status md_backend_choices_read(md_backend *be, const char *text)
{
    return be->tuning ? be->tuning->read(be, text) : MD_OK;
}
