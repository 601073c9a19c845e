/* h5_driver: an HDF5 file driver for files that are being created, which never tells HDF5 that a
 * write failed. libhdf5 1.10 cannot close a file after a failed write (a full disk) and crashes at
 * exit, or in MPI_Finalize; this driver keeps the first error for us instead and lets HDF5 come to
 * an end. */
#ifndef MD_H5_DRIVER_H
#define MD_H5_DRIVER_H

#include <hdf5.h>

/* Makes a file access list use the driver. Main thread only, as everything of HDF5. */
herr_t md_h5_driver_use(hid_t fapl);
/* errno of the first write that failed in the file closed last; 0 when all bytes were written. */
int md_h5_driver_error(void);

#endif
