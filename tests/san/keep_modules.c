/* keep_modules: linked into sanitizer builds only. Open MPI unloads its plug-ins at the end, and
 * the leak checker could no longer name what they left behind, so that tests/san/lsan.supp would
 * not match: here nothing is unloaded. */
int dlclose(void *handle);
int dlclose(void *handle)
{
    (void)handle;
    return 0;
}
