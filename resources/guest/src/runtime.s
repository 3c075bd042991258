# The functions that compiled code calls without being asked: there is no C library here. System V calling convention.
.section .text.runtime, "ax"
.global memcpy, memmove, memset, memcmp, bcmp, strlen

memmove:
    mov rax, rdi
    sub rax, rsi
    cmp rax, rdx
    jb 1f                               # the destination starts inside the source: from the end
memcpy:
    mov rax, rdi
    mov rcx, rdx
    rep movsb
    ret
1:  mov rax, rdi
    mov rcx, rdx
    lea rdi, [rdi + rdx - 1]
    lea rsi, [rsi + rdx - 1]
    std
    rep movsb
    cld
    ret

memset:
    mov r8, rdi
    mov eax, esi
    mov rcx, rdx
    rep stosb
    mov rax, r8
    ret

memcmp:
bcmp:
    xor eax, eax
    mov rcx, rdx
    cmp rcx, rcx                        # equal, should there be nothing to compare
    repe cmpsb
    je 1f
    movzx eax, byte ptr [rdi - 1]       # the first argument: CMPSB left both pointers one behind the difference
    movzx ecx, byte ptr [rsi - 1]
    sub eax, ecx
1:  ret

strlen:
    xor eax, eax
1:  cmp byte ptr [rdi + rax], 0
    je 2f
    inc rax
    jmp 1b
2:  ret
