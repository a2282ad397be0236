"""What the built-in functions of MySQL and MariaDB do. Pure data; what is not here is unknown."""

from __future__ import annotations

from typing import Final


def _words(table: str) -> frozenset[str]:
    return frozenset(table.split())


READ: Final = _words("""
    abs ascii avg benchmark bin bit_and bit_count bit_length bit_or bit_xor ceil ceiling char char_length
    concat concat_ws conv cos cot count crc32 curdate curtime date date_add date_format date_sub datediff
    day dayname dayofmonth dayofweek dayofyear degrees elt exp field find_in_set floor format from_unixtime
    group_concat hex hour if ifnull inet_aton inet_ntoa instr isnull json_array json_arrayagg json_contains
    json_extract json_keys json_length json_object json_objectagg json_unquote json_valid lcase length ln
    locate log log10 log2 lower lpad ltrim max md5 microsecond min minute mod month monthname now oct ord
    period_add pi pow power quarter quote radians rand replace reverse round rpad rtrim sec_to_time second
    sha1 sha2 sign sin sleep soundex space sqrt std stddev strcmp str_to_date substr substring_index sum
    sysdate tan time time_format time_to_sec timediff timestampdiff to_days truncate ucase unhex
    unix_timestamp upper utc_date utc_time utc_timestamp uuid var_pop var_samp variance week weekday year
""")
CONNECTION: Final = frozenset({"connection_id", "found_rows", "get_lock", "last_insert_id", "row_count"})
SERVER: Final = frozenset({"master_gtid_wait", "master_pos_wait"})
WRITE: Final = _words("is_free_lock is_used_lock nextval release_all_locks release_lock setval")
