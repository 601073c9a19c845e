# Functions of C files that are too long or take too many parameters; see lint_size.sh.
FNR == 1 { head = ""; inside = 0 }
!inside && /^[A-Za-z_].*\(/ && !/^(typedef|extern|#)/ && !/;$/ { head = ""; at = FNR; take = 1 }
!inside && take { head = head $0 }
!inside && /;$/ { take = 0 }
/^\{/ && take {
    inside = 1; take = 0; begin = FNR
    list = head; sub(/^[^(]*\(/, "", list); sub(/\)[^)]*$/, "", list)
    depth = 0; n = 1
    for (i = 1; i <= length(list); i++) {
        c = substr(list, i, 1)
        if (c == "(") depth++
        if (c == ")") depth--
        if (c == "," && !depth) n++
    }
    if (n > 6)
        print "error " FILENAME ":" at ": " n " parameters, more than 6"
}
/^\}/ && inside {
    inside = 0
    if (FNR - begin - 1 > 100)
        print "error " FILENAME ":" begin ": function of " FNR - begin - 1 " lines, more than 100"
    else if (FNR - begin - 1 > 60)
        print "warn " FILENAME ":" begin ": function of " FNR - begin - 1 " lines, more than 60"
}
