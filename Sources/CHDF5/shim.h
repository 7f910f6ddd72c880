#pragma once
// The interface of 1.10 (Debian 12, Ubuntu 24.04), which newer releases keep under this name.
#define H5_USE_110_API
#include <hdf5.h>

// HDF5's constants are macros that call H5open() first, which Swift cannot import.
static inline hid_t smelt_h5_u8(void) { return H5T_STD_U8LE; }
static inline hid_t smelt_h5_i8(void) { return H5T_STD_I8LE; }
static inline hid_t smelt_h5_u16(void) { return H5T_STD_U16LE; }
static inline hid_t smelt_h5_i16(void) { return H5T_STD_I16LE; }
static inline hid_t smelt_h5_u32(void) { return H5T_STD_U32LE; }
static inline hid_t smelt_h5_i32(void) { return H5T_STD_I32LE; }
static inline hid_t smelt_h5_u64(void) { return H5T_STD_U64LE; }
static inline hid_t smelt_h5_i64(void) { return H5T_STD_I64LE; }
static inline hid_t smelt_h5_f32(void) { return H5T_IEEE_F32LE; }
static inline hid_t smelt_h5_f64(void) { return H5T_IEEE_F64LE; }
static inline hid_t smelt_h5_c_string(void) { return H5T_C_S1; }
static inline hid_t smelt_h5_file_creation(void) { return H5P_FILE_CREATE; }
static inline hid_t smelt_h5_file_access(void) { return H5P_FILE_ACCESS; }
static inline hid_t smelt_h5_group_creation(void) { return H5P_GROUP_CREATE; }
static inline hid_t smelt_h5_dataset_creation(void) { return H5P_DATASET_CREATE; }
static inline hid_t smelt_h5_dataset_access(void) { return H5P_DATASET_ACCESS; }
static inline hid_t smelt_h5_link_creation(void) { return H5P_LINK_CREATE; }
static inline hid_t smelt_h5_attribute_creation(void) { return H5P_ATTRIBUTE_CREATE; }
static inline unsigned smelt_h5_truncate(void) { return H5F_ACC_TRUNC; }
static inline unsigned smelt_h5_read_write(void) { return H5F_ACC_RDWR; }
static inline unsigned smelt_h5_read_only(void) { return H5F_ACC_RDONLY; }
static inline hid_t smelt_h5_all(void) { return H5S_ALL; }

// Before H5open(), which the constants above would call: exit() must not run the library's
// cleanup, which crashes after a disk was full.
static inline herr_t smelt_h5_start(void) { return H5dont_atexit(); }

// 1.12 renamed these two and changed their structures; here only what all releases know.
typedef herr_t (*smelt_h5_link_visitor)(const char *name, int is_hard, void *context);
struct smelt_h5_link_visit { smelt_h5_link_visitor visitor; void *context; };
static inline herr_t smelt_h5_visit_link(hid_t group, const char *name, const H5L_info_t *info,
                                         void *context) {
  (void)group;
  struct smelt_h5_link_visit *visit = (struct smelt_h5_link_visit *)context;
  return visit->visitor(name, info->type == H5L_TYPE_HARD, visit->context);
}
static inline herr_t smelt_h5_links(hid_t group, H5_index_t order, smelt_h5_link_visitor visitor,
                                    void *context) {
  struct smelt_h5_link_visit visit = {visitor, context};
  return H5Literate(group, order, H5_ITER_INC, NULL, smelt_h5_visit_link, &visit);
}
static inline herr_t smelt_h5_address(hid_t object, haddr_t *address) {
  H5O_info_t info;
  herr_t result = H5Oget_info(object, &info);
  *address = info.addr;
  return result;
}
