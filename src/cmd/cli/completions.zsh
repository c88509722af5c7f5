#compdef s5

_s5() {
    local -a modes specs
    if (( CURRENT == 2 )); then
        modes=(
@first@
        )
        _describe mode modes
        return
    fi
    case $words[2] in
@cases@
    esac
    shift words
    (( CURRENT-- ))
    _arguments -s -S $specs '*: :_files'
}

if [[ $funcstack[1] == _s5 ]]; then
    _s5 "$@"
else
    compdef _s5 s5
fi
